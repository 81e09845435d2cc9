"""Tables of image paths or addresses: CSV, TSV, JSON Lines, Parquet."""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from upath import UPath

from clip_data import parquet
from clip_data.errors import DataError, RowError
from clip_data.opened import Opened, Record
from clip_data.readers import FileReader


def open_table(source: UPath, files: list[UPath]) -> Opened:
    """One file, or several of the same columns in a folder, whose image paths are relative to it.

    Raises:
        DataError: a file cannot be read or has no rows.
    """
    columns = list(dict.fromkeys(name for file in files[:1] for name in _columns(file)))
    root = source if source.is_dir() else source.parent
    root = root.resolve() if isinstance(root, Path) else root
    return Opened(FileReader(root), partial(_records, files), columns, None)


def _records(files: list[UPath]) -> Iterator[Record]:
    for file in files:
        yield from TABLES[file.suffix.lower()](file)


def _columns(path: UPath) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return parquet.read_columns(path)
    for record in TABLES[path.suffix.lower()](path):
        if isinstance(record, dict):
            return list(record)
    raise DataError(f"{path}: no rows; expected one for each image")


def _read_csv(path: UPath, delimiter: str) -> Iterator[Record]:
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter)
        header = next(lines, [])
        try:
            for line in lines:
                if len(line) == len(header):
                    yield dict(zip(header, line, strict=True))
                elif line:  # an empty line is no row
                    yield RowError("wrong number of columns", f"line {lines.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.line_num}: not readable ({error})") from error


def _read_jsonl(path: UPath) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json_object(line)
            except RowError as error:
                yield RowError(error.reason, f"line {number}")


TABLES: dict[str, Callable[[UPath], Iterator[Record]]] = {
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": parquet.read_records,
}


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises RowError: it is none."""
    try:
        value = json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RowError("not a JSON object")
    return cast(dict[str, Any], value)
