"""Parquet files: the one module that speaks to pyarrow, which has no types."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from clip_data.errors import DataError

_OUTCOME = pa.schema(
    {
        "key": pa.string(),
        "image": pa.string(),
        "status": pa.string(),  # success | failed
        "reason": pa.string(),
        "detail": pa.string(),
        "caption": pa.string(),
        "label": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
)


def read_columns(path: Path) -> list[str]:
    """The column names of a Parquet file. Raises DataError: it is none."""
    try:
        return list(pq.read_schema(path).names)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a batch in memory at a time. Raises DataError: it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged Parquet file ({error})") from error


def write_outcomes(file: BinaryIO, outcomes: list[dict[str, Any]]) -> None:
    """Write what became of each row of a shard, in the columns of NNNNN.parquet."""
    rows = [{name: _as_utf8(value) for name, value in outcome.items()} for outcome in outcomes]
    pq.write_table(pa.Table.from_pylist(rows, schema=_OUTCOME), file)


def _as_utf8(value: Any) -> Any:
    """Text without the surrogates that stand for bytes of another encoding."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
