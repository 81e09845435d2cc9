"""Pictures that look the same as others, by perceptual hash: listed, and left out."""

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from upath import UPath

from clip_data.atomic import whole_file, write_text
from clip_data.builder import MANIFEST
from clip_data.errors import DataError
from clip_data.inspector import tars_by_split
from clip_data.near_hashes import Numbers, first_that_stay, has_information, nearest
from clip_data.perceptual_hash import HashJob, hash_job, hash_shard, read_hashes
from clip_data.selection import Selected, source_tars, write_selection
from clip_data.sidecars import read_json
from clip_data.workers import run_jobs

log = logging.getLogger(__name__)

MAX_DISTANCE = 16
SUMMARY = "dedup.json"  # beside the manifest: what a second run answers
NAMED_FAULTS = 10

_COLUMNS = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("hash", pa.string()),
        ("duplicate_of_shard", pa.string()),
        ("duplicate_of_key", pa.string()),
        ("distance", pa.int8()),
    ]
)


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation set the source has: the share of duplicates in the paper."""

    name: str
    samples: int
    found: int
    """Of them, those that at least one sample of the source is a duplicate of."""
    not_compared: int
    """Plain or unreadable ones."""


@dataclass(frozen=True)
class DedupReport:
    """What deduplication has found, and written."""

    source: str
    distance: int
    samples: int
    duplicates: int
    """Samples that are duplicates, and so dropped."""
    plain: int
    """Samples of which the hash says nothing, such as those of one colour: they stay."""
    unreadable: dict[str, int]
    """Samples without a hash, by reason: they stay."""
    first_unreadable: list[str]
    most_common_hash: str | None
    """Of those that say something. Different pictures with one hash are drawings, mostly."""
    most_common_hash_samples: int
    against: list[Overlap]
    selected: Selected | None


def dedup(
    source: str | Path | UPath,
    output: str | Path | UPath | None,
    *,
    against: Sequence[str | Path | UPath] = (),
    distance: int = 0,
    report: str | Path | UPath | None = None,
    workers: int | None = None,
) -> DedupReport:
    """Drop each sample whose picture duplicates one in `against`; without, an earlier one.

    Two pictures are duplicates if at most `distance` of the 64 bits of their pHash (DCT) differ.
    Within the source a sample is dropped if an earlier one that stays is so near. With `against`
    the source is not compared with itself. A picture of which the hash says nothing, such as one
    of a single colour, is a duplicate of none. Beside an output, OUT.hashes keeps the hashes for
    the run after a killed one; it is removed at the end.

    Args:
        output: the folder of the shards of what stays; None for the report alone.
        against: folders of tars, or labelled sets with all their splits.
        distance: 0 to 16 bits. From about 8 on, different pictures are taken for duplicates.
        report: a .jsonl or .parquet file to list each sample that is dropped, and what of.
        workers: processes; None for one per core.

    Raises:
        DataError: no shards, a damaged one, nothing stays, or an output of something else.
    """
    source, output = UPath(source), None if output is None else UPath(output)
    report, against = None if report is None else UPath(report), [UPath(path) for path in against]
    if not 0 <= distance <= MAX_DISTANCE:
        raise DataError(f"distance {distance}: expected 0 to {MAX_DISTANCE} bits")
    if report is not None and report.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{report}: expected the name of a .jsonl or .parquet file")
    tars = [source_tars(source), *([tar for _, tar in tars_by_split(path)] for path in against)]
    if source == output or not set(tars[0]).isdisjoint(tar for group in tars[1:] for tar in group):
        raise DataError(f"{source}: is the output too, or one of the sets to compare it with")
    with ExitStack() as stack:
        if output is None:
            folder = UPath(stack.enter_context(tempfile.TemporaryDirectory(prefix="clip-data-")))
        else:
            folder = output.with_name(f"{output.name}.hashes")
        groups = [[hash_job(tar, folder) for tar in group] for group in tars]
        names = [[job.file.name for job in group] for group in groups]
        digest = hashlib.sha256(json.dumps([names, distance]).encode()).hexdigest()
        if output is not None:
            done = _earlier_result(output, digest, continued=folder.exists())
            if done is not None and (report is None or report.exists()):
                log.info("%s is complete: nothing left to do", output)
                _remove(folder)
                return done
        folder.mkdir(parents=True, exist_ok=True)
        _hash_all([job for group in groups for job in group], workers)
        result = _Comparison(groups, distance)
        if report is not None:
            result.write_report(report)
        selected = None
        if output is not None:
            selected = write_selection(
                source,
                output,
                result.keep(),
                arguments={"against": [str(path) for path in against], "distance": distance},
                workers=workers,
            )
        summary = result.summary(source, against, selected)
        if output is not None:
            text = json.dumps({"digest": digest, "report": asdict(summary)}, indent=1)
            write_text(output / SUMMARY, text)
            _remove(folder)
    return summary


def _remove(folder: UPath) -> None:
    if folder.exists():
        for file in list(folder.iterdir()):
            file.unlink()
        folder.rmdir()


def _earlier_result(output: UPath, digest: str, *, continued: bool) -> DedupReport | None:
    """What an earlier run of this very command has answered, if it had come to its end.

    Raises:
        DataError: the output is complete, and of something else.
    """
    if not (output / MANIFEST).exists():
        return None
    about = read_json(output / SUMMARY) or {}
    if about.get("digest") == digest:
        fields: dict[str, Any] = about["report"]
        fields["against"] = [Overlap(**overlap) for overlap in fields["against"]]
        fields["selected"] = Selected(**fields["selected"])
        return DedupReport(**fields)
    if continued:
        return None
    raise DataError(
        f"{output}: holds shards of another source, or of another command; write to another "
        "directory, or delete this one to write it anew"
    )


def _hash_all(jobs: Sequence[HashJob], workers: int | None) -> None:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    results = run_jobs(hash_shard, jobs, workers)
    for _ in tqdm(results, total=len(jobs), desc="hashes", unit="shard", disable=None):
        pass


class _Hashed:
    """The hashes of shards' samples, all in order; their keys are read when they are wanted."""

    def __init__(self, jobs: Sequence[HashJob]) -> None:
        self.jobs = jobs
        self.reasons = Counter[str]()
        self.first_faults: list[str] = []
        hashes: list[Any] = []
        for job in jobs:
            shard = read_hashes(job)
            hashes.append(np.array(shard.hashes, np.uint64))
            self.reasons.update(shard.faults.values())
            faults = islice(shard.faults.items(), NAMED_FAULTS - len(self.first_faults))
            self.first_faults += [f"{job.tar}: {key}: {reason}" for key, reason in faults]
        self.starts = np.cumsum([0, *map(len, hashes)])
        self.hashes = np.concatenate(hashes)
        self.telling = np.flatnonzero(has_information(self.hashes))

    def shards(self) -> Iterator[tuple[UPath, list[str], int]]:
        """Each shard, its keys, and the number of its first sample."""
        for job, start in zip(self.jobs, self.starts.tolist(), strict=False):
            yield job.tar, read_hashes(job).keys, start


class _Comparison:
    """Which samples are duplicates, and of what. Without `groups[1:]`, the first is its own."""

    def __init__(self, groups: Sequence[Sequence[HashJob]], distance: int) -> None:
        self.distance = distance
        self.own = own = _Hashed(groups[0])
        self.other = other = own
        self.original = np.full(len(own.hashes), -1)  # its number in `other`; -1: no duplicate
        if len(groups) == 1:
            first = own.telling[first_that_stay(own.hashes[own.telling], distance)]
            self.original[own.telling] = np.where(first == own.telling, -1, first)
            return
        self.other = other = _Hashed([job for group in groups[1:] for job in group])
        self.ends = other.starts[np.cumsum([len(group) for group in groups[1:]])]
        number, found = nearest(own.hashes[own.telling], other.hashes[other.telling], distance)
        self.found = other.telling[found]
        if len(other.telling):
            self.original[own.telling] = np.where(number < 0, -1, other.telling[number])

    def keep(self) -> Iterator[tuple[UPath, frozenset[str] | None]]:
        """For each shard the keys that stay, None if all do."""
        for tar, keys, start in self.own.shards():
            stays = self.original[start : start + len(keys)] < 0
            yield tar, None if stays.all() else frozenset(compress(keys, stays))

    def write_report(self, path: UPath) -> None:
        """A row for each sample that is dropped, in order; JSON Lines or Parquet."""
        with whole_file(path) as file:
            if path.suffix == ".jsonl":
                for row in self._rows():
                    file.write(json.dumps(row).encode() + b"\n")
                return
            with pq.ParquetWriter(file, _COLUMNS) as writer:
                rows = self._rows()
                while batch := list(islice(rows, 65_536)):
                    writer.write_table(pa.Table.from_pylist(batch, _COLUMNS))

    def _rows(self) -> Iterator[dict[str, Any]]:
        wanted = np.unique(self.original[self.original >= 0])
        names: dict[int, tuple[str, str]] = {}
        for tar, keys, start in self.other.shards():
            low, high = np.searchsorted(wanted, [start, start + len(keys)])
            names.update((n, (str(tar), keys[n - start])) for n in wanted[low:high].tolist())
        for tar, keys, start in self.own.shards():
            for row in np.flatnonzero(self.original[start : start + len(keys)] >= 0).tolist():
                original = int(self.original[start + row])
                value, other = int(self.own.hashes[start + row]), int(self.other.hashes[original])
                shard, key = names[original]
                yield {
                    "shard": str(tar),
                    "key": keys[row],
                    "hash": f"{value:016x}",
                    "duplicate_of_shard": shard,
                    "duplicate_of_key": key,
                    "distance": (value ^ other).bit_count(),
                }

    def summary(
        self, source: UPath, against: Sequence[UPath], selected: Selected | None
    ) -> DedupReport:
        """The counts."""
        own, unreadable = self.own, self.own.reasons.total()
        values, counts = np.unique(own.hashes[own.telling], return_counts=True)
        most = int(np.argmax(counts)) if len(counts) else None
        return DedupReport(
            source=str(source),
            distance=self.distance,
            samples=len(own.hashes),
            duplicates=int((self.original >= 0).sum()),
            plain=len(own.hashes) - len(own.telling) - unreadable,
            unreadable=dict(sorted(own.reasons.items())),
            first_unreadable=own.first_faults,
            most_common_hash=None if most is None else f"{int(values[most]):016x}",
            most_common_hash_samples=0 if most is None else int(counts[most]),
            against=[self._overlap(number, path) for number, path in enumerate(against)],
            selected=selected,
        )

    def _overlap(self, number: int, path: UPath) -> Overlap:
        begin, end = ([0, *self.ends.tolist()])[number : number + 2]

        def count(numbers: Numbers) -> int:
            return int(np.diff(np.searchsorted(numbers, [begin, end]))[0])

        compared = count(self.other.telling)
        return Overlap(str(path), end - begin, count(self.found), end - begin - compared)
