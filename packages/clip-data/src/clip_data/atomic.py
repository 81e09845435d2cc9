"""Files that appear whole or not at all, on a disk or in an object store."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from upath import UPath

PARTIAL = ".partial"  # the suffix of a file that is still being written


@contextmanager
def whole_file(path: UPath) -> Generator[BinaryIO]:
    """A binary file to write: `path` once the block has ended, nothing if it has raised."""
    if not isinstance(path, Path):
        with _uploaded(path) as file:
            yield file
        return
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: UPath, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def _uploaded(path: UPath) -> Generator[BinaryIO]:
    """Written on this machine's disk, then put in one piece: object stores cannot rename."""
    with tempfile.NamedTemporaryFile(prefix="clip-data-") as file:
        yield cast(BinaryIO, file)
        file.flush()
        path.fs.put_file(file.name, path.path)
