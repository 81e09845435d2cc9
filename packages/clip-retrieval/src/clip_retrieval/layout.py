"""An index directory on disk: generations of files, and index.json, which names one of them.

INDEX/index.json            what it was made from, the plan, the recall measured, the files' sizes
INDEX/gN/image.index        FAISS's index of the codes, read into memory
INDEX/gN/lists.ivfdata      the on-disk family's inverted lists, memory-mapped
INDEX/gN/rows.index         float16 rows, memory-mapped, for exact scores (vectors.py)
INDEX/gN/metadata.arrow     key, caption, url, json, place of the picture; a row per row
INDEX/gN/held_out.npz       text queries that the search was tuned with, for the next change

A change writes a new generation beside the old one and then replaces index.json: whoever reads
meets a whole index, before, during and after.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_retrieval.errors import RetrievalError

FORMAT = 2


def generation(path: Path, facts: dict[str, Any]) -> Path:
    """The directory of the files that `facts` speak of."""
    return path / f"g{facts['generation']}"


def write_facts(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Put a finished generation in place; older ones are deleted. Returns what index.json says."""
    files = generation(path, facts)
    sizes = {file.name: file.stat().st_size for file in sorted(files.iterdir())}
    facts = {"format": FORMAT} | facts | {"bytes": sizes}
    for file in files.iterdir():
        _flush(file)
    temporary = path / "index.json.tmp"
    temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path / "index.json")
    for old in path.glob("g*"):
        if old != files:
            shutil.rmtree(old)
    return facts


def _flush(file: Path) -> None:
    """To the disk, so that no power cut leaves a new index.json beside old bytes."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def read_facts(path: Path) -> dict[str, Any]:
    """The contents of index.json, once every file is found to be there and whole.

    Raises:
        RetrievalError: no index, one of another format, or one with a missing or truncated file.
    """
    while True:
        facts = _read_json(path)
        if (fault := _fault(path, facts)) is None:
            return facts
        if _read_json(path)["generation"] == facts["generation"]:  # else it was replaced just now
            raise RetrievalError(f"{fault}; build the index again")


def _fault(path: Path, facts: dict[str, Any]) -> str | None:
    for name, expected in facts["bytes"].items():
        file = generation(path, facts) / name
        try:
            found = f"{file.stat().st_size} bytes"
        except FileNotFoundError:
            found = "no file"
        if found != f"{expected} bytes":
            return f"{file}: {found}, expected {expected} bytes"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "index.json"
    if not file.is_file():
        raise RetrievalError(
            f"{path} is no index (no index.json); make one with "
            f"`clip-retrieval build-index MODEL SOURCE {path}`"
        )
    try:
        facts: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise RetrievalError(f"{file} is not JSON ({error}); build the index again") from error
    if facts.get("format") != FORMAT:
        raise RetrievalError(
            f"{file}: format {facts.get('format')}, expected {FORMAT}; build the index again"
        )
    return facts


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold a directory against others that would change it; a process that dies lets go of it.

    Raises:
        RetrievalError: another process is changing it.
    """
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetrievalError(f"{path}: another process is changing it; wait for it") from None
        yield
