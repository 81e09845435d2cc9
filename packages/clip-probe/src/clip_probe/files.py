"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_file(file: Path, write: Callable[[Path], object], writer: str = "part") -> None:
    """Let `write` make a sibling of the file, which then takes its place; folders are made.

    What a killed process leaves, the next one that writes the file replaces. `writer` tells apart
    processes that may write one file at a time.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{writer}")
    write(temporary)
    os.replace(temporary, file)


def write_text(file: Path, text: str, writer: str = "part") -> None:
    """Write text as UTF-8."""
    write_file(file, lambda to: to.write_text(text, encoding="utf-8"), writer)
