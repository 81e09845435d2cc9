"""Which rows go into which shard, decided before any image is read.

A shard depends on its slice of the rows alone: workers need not know of each other, and a shard
that is done need not be done again.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from clip_data.readers import row_digest
from clip_data.samples import Row
from clip_data.sources import Source


@dataclass(frozen=True)
class Plan:
    """A source's rows in order, cut into shards."""

    source: Source
    samples_per_shard: int
    shuffle_seed: int | None
    """None keeps the order of the source."""
    hash_range: tuple[float, float]
    """The rows whose image's name hashes into this part of [0, 1)."""
    options: str
    """Whatever else decides what is written for a row."""

    def slices(self) -> Iterator[tuple[Row, ...]]:
        """The rows of each shard, a slice in memory at a time."""
        rows = self._rows() if self.shuffle_seed is None else self._shuffled.rows()
        while slice_ := tuple(islice(rows, self.samples_per_shard)):
            yield slice_

    def keys(self, shard: int, rows: int, *, split: bool) -> tuple[str, ...]:
        """The keys of a shard's rows: img2dataset's 000120034, or in a split s0120034."""
        if split:
            first = shard * self.samples_per_shard
            return tuple(f"s{first + row:07d}" for row in range(rows))
        digits = max(4, len(str(self.samples_per_shard - 1)))
        return tuple(f"{shard:05d}{row:0{digits}d}" for row in range(rows))

    def _rows(self) -> Iterator[Row]:
        low, high = self.hash_range
        for row in self.source.rows():
            if (low, high) == (0, 1) or low <= _hash_share(row.image) < high:
                yield row

    @cached_property
    def _shuffled(self) -> "_Shuffled":
        return _Shuffled(self._rows(), self.shuffle_seed or 0)


class _Shuffled:
    """Rows by the hash of (seed, position), sorted on disk: they may not fit into memory."""

    def __init__(self, rows: Iterator[Row], seed: int) -> None:
        self._database = sqlite3.connect("")  # a temporary file, gone when it is closed
        self._database.execute("CREATE TABLE rows (rank BLOB, row TEXT)")
        ranked = (
            (
                hashlib.sha256(f"{seed} {position}".encode()).digest(),
                json.dumps(row.fields, default=str),
            )
            for position, row in enumerate(rows)
        )
        self._database.executemany("INSERT INTO rows VALUES (?, ?)", ranked)

    def rows(self) -> Iterator[Row]:
        for (text,) in self._database.execute("SELECT row FROM rows ORDER BY rank"):
            image, captions, label, extra, fault, place, remark = json.loads(text)
            lines = None if captions is None else tuple(captions)
            yield Row(image, lines, label, extra, fault, tuple(place), remark)


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells, without opening an image."""

    rows: int
    labels: frozenset[str]
    digests: list[str]
    """A hash for each shard: of the `row_digest` of its rows."""


def survey(plan: Plan) -> Survey:
    """Pass over the rows once."""
    rows, labels, digests = 0, set[str](), list[str]()
    for slice_ in plan.slices():
        digest = hashlib.sha256(plan.options.encode())
        for row in slice_:
            digest.update(row_digest(row, plan.source.reader, plan.options).encode())
            if row.label is not None:
                labels.add(row.label)
        rows += len(slice_)
        digests.append(digest.hexdigest())
    return Survey(rows, frozenset(labels), digests)


def _hash_share(name: str) -> float:
    """A number in [0, 1) that a name always has."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
