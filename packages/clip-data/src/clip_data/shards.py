"""One shard: a slice of a source's rows becomes a tar and the four files that describe it.

NNNNN.tar          the samples, byte for byte the same whenever and wherever it is written
NNNNN.index.json   where each member's bytes lie in the tar
NNNNN.parquet      what became of every row
NNNNN_stats.json   counts and hashes; written last, it says that the shard is done
"""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clip_data.atomic import whole_file, write_text
from clip_data.errors import RowError
from clip_data.parquet import write_outcomes
from clip_data.samples import Row, Sample, read_sample

FORMAT = 1
STATS = "_stats.json"
NAMED_FAILURES = 3  # a message names the first few

# Where a member's data lies in its tar: [offset, size].
Span = list[int]


@dataclass(frozen=True)
class Job:
    """All that a worker needs to write one shard."""

    tar: Path
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    root: str
    classes: Mapping[str, int] | None
    digest: str


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
    first_failures: list[str]
    bytes: int
    sha256: str


def write_shard(job: Job) -> ShardStats:
    """Write the tar and its sidecars. Bad rows are left out of the tar, and listed."""
    outcomes: list[dict[str, Any]] = []
    samples: list[tuple[str, dict[str, Span]]] = []
    with whole_file(job.tar) as file:
        writer = TarWriter(file)
        for key, row in zip(job.keys, job.rows, strict=True):
            try:
                sample = read_sample(row, key, job.root, job.classes)
            except RowError as error:
                outcomes.append(_outcome(key, row, error))
            else:
                members = sample.members.items()
                samples.append((key, {e: writer.add(f"{key}.{e}", data) for e, data in members}))
                outcomes.append(_outcome(key, row, sample))
        writer.close()
    write_text(index_path(job.tar), json.dumps(build_index(writer.bytes, samples)))
    with whole_file(job.tar.with_suffix(".parquet")) as file:
        write_outcomes(file, outcomes)
    failures = [outcome for outcome in outcomes if outcome["status"] == "failed"]
    stats = ShardStats(
        name=job.tar.name,
        digest=job.digest,
        samples=len(samples),
        failed=len(failures),
        reasons=dict(sorted(Counter(failure["reason"] for failure in failures).items())),
        first_failures=[f"{f['image']}: {f['reason']}" for f in failures[:NAMED_FAILURES]],
        bytes=writer.bytes,
        sha256=writer.sha256,
    )
    write_text(stats_path(job.tar), json.dumps({"format": FORMAT, **asdict(stats)}, indent=1))
    return stats


def index_path(tar: Path) -> Path:
    """NNNNN.index.json of NNNNN.tar."""
    return tar.with_suffix(".index.json")


def stats_path(tar: Path) -> Path:
    """NNNNN_stats.json of NNNNN.tar."""
    return tar.with_name(tar.stem + STATS)


def read_stats(path: Path) -> ShardStats:
    """What `write_shard` has written."""
    fields = json.loads(path.read_bytes())
    del fields["format"]
    return ShardStats(**fields)


def build_index(
    tar_bytes: int, samples: Iterable[tuple[str, Mapping[str, Span]]]
) -> dict[str, Any]:
    """The contents of NNNNN.index.json: `keys`, and for each extension a list parallel to them."""
    keys: list[str] = []
    members: dict[str, list[Span | None]] = {}
    for row, (key, spans) in enumerate(samples):
        keys.append(key)
        for extension in [*members, *(e for e in spans if e not in members)]:
            column = members.setdefault(extension, [None] * row)
            column.append(spans.get(extension))
    return {"format": FORMAT, "tar_bytes": tar_bytes, "keys": keys, "members": members}


class TarWriter:
    """An uncompressed tar (POSIX ustar) whose bytes depend on its members alone."""

    def __init__(self, file: BinaryIO) -> None:
        self.bytes = 0
        self._file = file
        self._sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> Span:
        """Append a member; where its data lies."""
        member = tarfile.TarInfo(name)  # mode 0644, owner 0, mtime 0
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        span = [self.bytes, len(data)]
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return span

    def close(self) -> None:
        """Append the end-of-archive marker, padded to a whole record as tar does."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))

    @property
    def sha256(self) -> str:
        """Of all the bytes written."""
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)


def _outcome(key: str, row: Row, result: Sample | RowError) -> dict[str, Any]:
    outcome = {
        "key": key,
        "image": row.image,
        "caption": None if row.captions is None else "\n".join(row.captions),
        "label": row.label,
    }
    if isinstance(result, RowError):
        failure = {"status": "failed", "reason": result.reason, "detail": result.detail}
        return {**outcome, **failure}
    return {**outcome, "status": "success", "width": result.width, "height": result.height}
