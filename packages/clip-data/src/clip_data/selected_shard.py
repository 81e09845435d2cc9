"""One shard of a selection: linked if all of it stays, else written anew."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from clip_data.atomic import whole_file, write_text
from clip_data.errors import DataError
from clip_data.shards import ShardStats, read_stats, stats_path, write_stats
from clip_data.sidecars import count_samples, read_members, read_own_stats, read_table
from clip_data.tar import FORMAT, Spans, TarWriter, build_index, index_path, read_span, tar_size


@dataclass(frozen=True)
class Job:
    """All that a worker needs to write one shard."""

    tar: UPath
    keys: frozenset[str] | None
    """Those that stay. None: all."""
    target: UPath | None
    """The tar to write. None: nothing stays."""


@dataclass(frozen=True)
class Done:
    """What has become of it."""

    stats: ShardStats | None
    """None: nothing stays."""
    dropped: int
    written: bool
    """False: it was there."""


def write_selected(job: Job) -> Done:
    """Write the tar and its sidecars, the stats last, unless an earlier run has."""
    tar, target, samples = job.tar, job.target, count_samples(job.tar)
    if target is None:
        return Done(None, samples, written=False)
    dropped = 0 if job.keys is None else samples - len(job.keys)
    keys = None if job.keys is None else sorted(job.keys)
    known = read_own_stats(tar)
    identity = json.dumps([FORMAT, tar.stat().st_size, known and known.sha256, keys])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    stats = _finished(tar, target, digest)
    if stats is not None:
        return Done(stats, dropped, written=False)
    if job.keys is not None and dropped:
        stats = _rewrite(tar, target, job.keys)
    else:
        stats = _link_shard(tar, target, job.keys, known)
    stats = replace(stats, name=target.name, digest=digest)
    write_stats(target, stats)
    return Done(stats, dropped, written=True)


def _finished(tar: UPath, target: UPath, digest: str) -> ShardStats | None:
    """The stats of a shard that an earlier run of this very selection has finished.

    Raises:
        DataError: the shard is of another selection.
    """
    stats = read_stats(stats_path(target)) if stats_path(target).exists() else None
    if stats is None:
        return None
    if stats.digest != digest:
        raise DataError(
            f"{target}: of another source or selection; write to another directory, or delete "
            f"{target.parent} to write it anew"
        )
    files = [target, index_path(target)]
    if tar.with_suffix(".parquet").exists():
        files.append(target.with_suffix(".parquet"))
    whole = all(file.exists() for file in files) and target.stat().st_size == stats.bytes
    return stats if whole else None


def _link_shard(
    tar: UPath, target: UPath, keys: frozenset[str] | None, known: ShardStats | None
) -> ShardStats:
    """The tar and its sidecars as they are; an index is written where there is none."""
    _link(tar, target)
    if tar.with_suffix(".parquet").exists():
        _link(tar.with_suffix(".parquet"), target.with_suffix(".parquet"))
    if known is not None and index_path(tar).exists():
        _link(index_path(tar), index_path(target))
        return known
    with tar.open("rb") as file:
        members = read_members(tar, file)
        if keys is not None and keys != frozenset(key for key, _ in members):
            raise _disagreement(tar)
        index = build_index(tar_size(file), members)
        file.seek(0)
        sha256 = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    write_text(index_path(target), json.dumps(index))
    return _stats(len(members), index["tar_bytes"], sha256)


def _rewrite(tar: UPath, target: UPath, keys: frozenset[str]) -> ShardStats:
    """The samples that stay: their members as they lie, the parquet's rows as they are."""
    table = read_table(tar)
    if table is not None and "key" not in table.column_names:
        raise DataError(f"{tar.with_suffix('.parquet')}: no column 'key', so no way to cut it")
    samples: list[Spans] = []
    with tar.open("rb") as source:
        members = [(key, spans) for key, spans in read_members(tar, source) if key in keys]
        if len(members) != len(keys):
            raise _disagreement(tar)
        with whole_file(target) as file:
            writer = TarWriter(file)
            for key, spans in members:
                copied: dict[str, list[int]] = {}
                for extension, span in sorted(spans.items(), key=lambda member: member[1]):
                    name = f"{key}.{extension}" if extension else key
                    try:
                        copied[extension] = writer.add(name, read_span(source, span))
                    except ValueError as error:  # no room in ustar for the name or the size
                        raise DataError(f"{tar}: {name}: {error}; build it again") from error
                samples.append((key, copied))
            writer.close()
    write_text(index_path(target), json.dumps(build_index(writer.bytes, samples)))
    if table is not None:
        stays = pa.array([str(key) in keys for key in table["key"].to_pylist()], pa.bool_())
        with whole_file(target.with_suffix(".parquet")) as file:
            pq.write_table(table.filter(stays), file)
    return _stats(len(samples), writer.bytes, writer.sha256)


def _stats(samples: int, size: int, sha256: str) -> ShardStats:
    """Of a shard that has no failed rows; its name and digest are filled in later."""
    return ShardStats(
        name="",
        digest="",
        samples=samples,
        failed=0,
        reasons={},
        remarks={},
        first_failures=[],
        bytes=size,
        sha256=sha256,
    )


def _disagreement(tar: UPath) -> DataError:
    return DataError(
        f"{tar}: its sidecars list other keys than it holds; see clip-data verify, and delete the "
        "sidecars that are wrong"
    )


def _link(path: UPath, target: UPath) -> None:
    """A hard link, or a copy where none can be made."""
    if isinstance(path, Path) and isinstance(target, Path):
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(path.resolve())
            return
        except OSError:  # another disk, or one without links; copying tells of any other trouble
            pass
    with path.open("rb") as source, whole_file(target) as file:
        shutil.copyfileobj(source, file, 1 << 20)
