"""One shard: a slice of a source's rows becomes a tar and the four files that describe it.

NNNNN.tar          the samples, byte for byte the same whenever and wherever it is written
NNNNN.index.json   where each member's bytes lie in the tar
NNNNN.parquet      what became of every row
NNNNN_stats.json   counts and hashes; written last, it says that the shard is done
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from upath import UPath

from clip_data.atomic import whole_file, write_text
from clip_data.errors import RowError
from clip_data.images import ImageOptions
from clip_data.parquet import read_records, write_outcomes
from clip_data.readers import Reader, row_digest
from clip_data.samples import Row, Sample, make_sample
from clip_data.tar import FORMAT, Spans, TarWriter, build_index, index_path, read_span
from clip_data.workers import report_progress

STATS = "_stats.json"
NAMED_FAILURES = 3  # a message names the first few


@dataclass(frozen=True)
class Job:
    """All that a worker needs to write one shard."""

    tar: UPath
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    reader: Reader
    images: ImageOptions
    classes: Mapping[str, int] | None
    digest: str
    options: str
    """What decides, beside a row, what is written for it."""
    threads: int
    """That read and check images in this worker."""


@dataclass(frozen=True)
class ShardStats:
    """What a finished shard holds."""

    name: str
    """File name of the tar."""
    digest: str
    """Hash of the rows and options it was made from."""
    samples: int
    failed: int
    reasons: dict[str, int]
    remarks: dict[str, int]
    first_failures: list[str]
    bytes: int
    sha256: str


def write_shard(job: Job) -> ShardStats:
    """Write the tar and its sidecars. Bad rows are left out of the tar, and listed.

    Samples that an earlier attempt has written of the same rows are taken from its tar.
    """
    outcomes: list[dict[str, Any]] = []
    samples: list[Spans] = []
    digests = [row_digest(row, job.reader, job.options) for row in job.rows]
    earlier = _earlier_samples(job.tar, dict(zip(job.keys, digests, strict=True)))
    with whole_file(job.tar) as file:
        writer = TarWriter(file)
        results = _make_samples(job, earlier)
        for key, row, digest, result in zip(job.keys, job.rows, digests, results, strict=True):
            if isinstance(result, Sample):
                members = result.members.items()
                samples.append((key, {e: writer.add(f"{key}.{e}", data) for e, data in members}))
            outcomes.append(_outcome(key, row, digest, result))
            report_progress(1)
        writer.close()
    write_text(index_path(job.tar), json.dumps(build_index(writer.bytes, samples)))
    with whole_file(job.tar.with_suffix(".parquet")) as file:
        write_outcomes(file, outcomes, [row.extra or {} for row in job.rows])
    failures = [outcome for outcome in outcomes if outcome["status"] == "failed"]
    remarks = (row.remark.partition(" from ")[0] for row in job.rows if row.remark)
    stats = ShardStats(
        name=job.tar.name,
        digest=job.digest,
        samples=len(samples),
        failed=len(failures),
        reasons=dict(sorted(Counter(failure["reason"] for failure in failures).items())),
        remarks=dict(sorted(Counter(remarks).items())),
        first_failures=[f"{f['image']}: {f['reason']}" for f in failures[:NAMED_FAILURES]],
        bytes=writer.bytes,
        sha256=writer.sha256,
    )
    write_stats(job.tar, stats)
    return stats


def stats_path(tar: UPath) -> UPath:
    """NNNNN_stats.json of NNNNN.tar."""
    return tar.with_name(tar.stem + STATS)


def write_stats(tar: UPath, stats: ShardStats) -> None:
    """Write NNNNN_stats.json: the shard is done."""
    write_text(stats_path(tar), json.dumps({"format": FORMAT, **asdict(stats)}, indent=1))


def read_stats(path: UPath) -> ShardStats | None:
    """What `write_stats` has written; None if another tool has written it."""
    fields = json.loads(path.read_bytes())
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        return None
    return ShardStats(**fields)


# Samples ------------------------------------------------------------------------------------------


def _make_samples(job: Job, earlier: Mapping[str, Sample]) -> Iterator[Sample | RowError]:
    """What becomes of each row, in order; a few of them are in memory at a time."""
    pairs = list(zip(job.keys, job.rows, strict=True))
    wanted = [row for key, row in pairs if row.fault is None and key not in earlier]

    def tasks(reads: Iterator[Callable[[], bytes]]) -> Iterator[Callable[[], Sample | RowError]]:
        for key, row in pairs:
            if key in earlier:
                yield partial(earlier.__getitem__, key)
            elif row.fault is not None:
                yield partial(RowError, row.fault)
            else:
                yield partial(_try, row, key, next(reads), job.images, job.classes)

    with closing(job.reader.images(wanted)) as reads, ThreadPoolExecutor(job.threads) as pool:
        pending: deque[Future[Sample | RowError]] = deque()
        for task in tasks(reads):
            pending.append(pool.submit(task))
            if len(pending) == 4 * job.threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _try(*arguments: Any) -> Sample | RowError:
    try:
        return make_sample(*arguments)
    except RowError as error:
        return error


class _Earlier(Mapping[str, Sample]):
    """Samples of a tar that is there, by key, read when they are asked for."""

    def __init__(self, tar: UPath, found: dict[str, dict[str, Any]]) -> None:
        self._tar, self._found = tar, found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __getitem__(self, key: str) -> Sample:
        found = self._found[key]
        with self._tar.open("rb") as file:
            members = {e: read_span(file, span) for e, span in found["spans"].items()}
        return Sample(members, found["width"], found["height"])


def _earlier_samples(tar: UPath, digests: Mapping[str, str]) -> Mapping[str, Sample]:
    """What an earlier attempt has written for the very same rows, if there was one."""
    table, index = tar.with_suffix(".parquet"), index_path(tar)
    if not (tar.exists() and index.exists() and table.exists()):
        return {}
    about = json.loads(index.read_bytes())
    if tar.stat().st_size != about["tar_bytes"]:
        return {}
    found = {
        row["key"]: {"width": row["width"], "height": row["height"]}
        for row in read_records(table)
        if row["status"] == "success" and row["digest"] == digests.get(row["key"])
    }
    for position, key in enumerate(about["keys"]):
        if key in found:
            spans = {e: column[position] for e, column in about["members"].items()}
            there = [(e, span) for e, span in spans.items() if span is not None]
            found[key]["spans"] = dict(sorted(there, key=lambda member: member[1]))
    return _Earlier(tar, {key: about for key, about in found.items() if "spans" in about})


def _outcome(key: str, row: Row, digest: str, result: Sample | RowError) -> dict[str, Any]:
    outcome = {
        "key": key,
        "image": row.image,
        "detail": row.remark,
        "caption": None if row.captions is None else "\n".join(row.captions),
        "label": row.label,
        "digest": digest,
    }
    if isinstance(result, RowError):
        failure = {"status": "failed", "reason": result.reason, "detail": result.detail}
        return {**outcome, **failure}
    return {**outcome, "status": "success", "width": result.width, "height": result.height}
