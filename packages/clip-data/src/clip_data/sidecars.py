"""What a shard holds: by its sidecars if there are any, whoever has written them, else by itself.

img2dataset's shards have a parquet and stats of another shape; plain tars have nothing.
"""

import json
import tarfile
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from clip_data.errors import DataError
from clip_data.shards import ShardStats, read_stats, stats_path
from clip_data.tar import Spans, index_path, read_samples, tar_size


def read_keys(tar: UPath, *, trust_parquet: bool = True) -> list[str]:
    """The keys of a shard: by its index, else the successes of its parquet, else the tar.

    Raises:
        DataError: a key is there twice, or the shard is damaged.
    """
    index = read_json(index_path(tar))
    table = read_table(tar) if index is None and trust_parquet else None
    if index is not None:
        keys = cast(list[str], index["keys"])
    elif table is not None and {"key", "status"} <= set(table.column_names):
        rows = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
        keys = list(dict.fromkeys(str(key) for key, status in rows if status == "success"))
    else:
        with tar.open("rb") as file:
            keys = [key for key, _ in read_members(tar, file)]
    if len(set(keys)) < len(keys):
        raise DataError(f"{tar}: a key is there twice; see clip-data verify, and build it again")
    return keys


def read_members(tar: UPath, file: BinaryIO) -> list[Spans]:
    """The samples of an open tar: by its index if there is one, else by its headers.

    Raises:
        DataError: the tar is damaged, or the index is another's.
    """
    index = read_json(index_path(tar))
    if index is None:
        try:
            return list(read_samples(file))
        except tarfile.TarError as error:
            raise DataError(f"{tar}: damaged ({error}); get or build it again") from error
    if index["tar_bytes"] != tar_size(file):
        raise _wrong_size(tar, tar_size(file), index["tar_bytes"])
    columns = index["members"].items()
    return [
        (key, {extension: column[row] for extension, column in columns if column[row]})
        for row, key in enumerate(index["keys"])
    ]


def read_table(tar: UPath) -> Any:
    """NNNNN.parquet of NNNNN.tar, a pyarrow.Table; None if there is none.

    Raises:
        DataError: it is damaged.
    """
    path = tar.with_suffix(".parquet")
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            return pq.ParquetFile(file).read()
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged Parquet file ({error})") from error


def count_samples(tar: UPath) -> int:
    """The samples of a shard: by our stats if they are there, else by its keys."""
    stats = read_own_stats(tar)
    return stats.samples if stats is not None else len(read_keys(tar))


def read_own_stats(tar: UPath) -> ShardStats | None:
    """A shard's stats, None if there are none or another tool's.

    Raises:
        DataError: they are of another tar.
    """
    path = stats_path(tar)
    try:
        stats = read_stats(path) if path.exists() else None
    except ValueError as error:
        raise DataError(f"{path}: not readable ({error}); delete it") from error
    if stats is not None and stats.bytes != (size := tar.stat().st_size):
        raise _wrong_size(tar, size, stats.bytes)
    return stats


def read_json(path: UPath) -> dict[str, Any] | None:
    """A sidecar's contents, None if there is none. Raises DataError: it is damaged."""
    try:
        return json.loads(path.read_bytes() or b"{}") if path.exists() else None
    except ValueError as error:
        raise DataError(f"{path}: not readable ({error}); delete it") from error


def _wrong_size(tar: UPath, found: int, expected: int) -> DataError:
    return DataError(f"{tar}: {found} bytes, its sidecars say {expected}; get or build it again")
