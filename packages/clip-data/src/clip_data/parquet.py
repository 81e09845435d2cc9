"""Parquet tables: rows of a source, and what became of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from clip_data.errors import DataError

_OUTCOME = {
    "key": pa.string(),
    "image": pa.string(),
    "status": pa.string(),  # success | failed
    "reason": pa.string(),
    "detail": pa.string(),
    "caption": pa.string(),
    "label": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "digest": pa.string(),
}


def read_columns(path: UPath) -> list[str]:
    """The column names of a Parquet file. Raises DataError: it is none."""
    try:
        with path.open("rb") as file:
            return list(pq.read_schema(file).names)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def read_records(path: UPath) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a batch in memory at a time. Raises DataError: it is damaged."""
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged Parquet file ({error})") from error


def write_outcomes(
    file: BinaryIO, outcomes: Sequence[Mapping[str, Any]], extras: Sequence[Mapping[str, Any]]
) -> None:
    """Write what became of each row of a shard, and the other columns that its source has."""
    columns: dict[str, pa.Array] = {}
    for name, kind in _OUTCOME.items():
        columns[name] = pa.array([_as_utf8(outcome.get(name)) for outcome in outcomes], kind)
    for name in dict.fromkeys(name for extra in extras for name in extra):
        if name not in columns:
            columns[_as_utf8(name)] = _column([extra.get(name) for extra in extras])
    pq.write_table(pa.table(columns), file)


def _column(values: list[Any]) -> Any:
    """Of the type that all values have; as JSON texts where they have none in common."""
    try:
        return pa.array([_as_utf8(value) for value in values])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([None if v is None else json.dumps(v, default=str) for v in values])


def _as_utf8(value: Any) -> Any:
    """Text without the surrogates that stand for bytes of another encoding."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
