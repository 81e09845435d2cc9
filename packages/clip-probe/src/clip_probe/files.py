"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a sibling of the file, which then takes its place; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, file)


def write_text(file: Path, text: str) -> None:
    """Write text as UTF-8."""
    write_file(file, lambda to: to.write_text(text, encoding="utf-8"))
