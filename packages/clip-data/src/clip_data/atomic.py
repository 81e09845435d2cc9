"""Files that appear whole or not at all."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # the suffix of a file that is still being written


@contextmanager
def whole_file(path: Path) -> Generator[BinaryIO]:
    """A binary file to write: `path` once the block has ended, nothing if it has raised."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())
