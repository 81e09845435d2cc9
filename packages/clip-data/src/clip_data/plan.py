"""Which rows go into which shard, decided before any image is read.

A shard depends on its slice of the rows alone: workers need not know of each other, and a shard
that is done need not be done again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from clip_data.samples import Row
from clip_data.sources import Source


@dataclass(frozen=True)
class Plan:
    """A source's rows in order, cut into shards."""

    source: Source
    samples_per_shard: int
    shuffle_seed: int | None
    """None keeps the order of the source."""

    def slices(self) -> Iterator[tuple[Row, ...]]:
        """The rows of each shard, a slice in memory at a time (all of them where shuffled)."""
        rows = self.source.rows()
        if self.shuffle_seed is not None:
            rows = _shuffled(list(rows), self.shuffle_seed)
        while slice_ := tuple(islice(rows, self.samples_per_shard)):
            yield slice_

    def keys(self, shard: int, rows: int, *, split: bool) -> tuple[str, ...]:
        """The keys of a shard's rows: img2dataset's 000120034, or in a split s0120034."""
        if split:
            first = shard * self.samples_per_shard
            return tuple(f"s{first + row:07d}" for row in range(rows))
        digits = max(4, len(str(self.samples_per_shard - 1)))
        return tuple(f"{shard:05d}{row:0{digits}d}" for row in range(rows))


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells, without opening an image."""

    rows: int
    labels: frozenset[str]
    digests: list[str]
    """A hash of each shard's rows and the sizes of their images."""


def survey(plan: Plan) -> Survey:
    """Pass over the rows once."""
    rows, labels, digests = 0, set[str](), list[str]()
    for slice_ in plan.slices():
        digest = hashlib.sha256()
        for row in slice_:
            fields = [row.image, row.captions, row.label, row.extra, row.fault]
            size = _size(os.path.join(plan.source.root, row.image))
            digest.update(json.dumps([*fields, size], default=str).encode())
            if row.label is not None:
                labels.add(row.label)
        rows += len(slice_)
        digests.append(digest.hexdigest())
    return Survey(rows, frozenset(labels), digests)


def _shuffled(rows: list[Row], seed: int) -> Iterator[Row]:
    """By the hash of (seed, position): the same order in every version of every library."""

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"{seed} {position}".encode()).digest()

    return (rows[position] for position in sorted(range(len(rows)), key=rank))


def _size(path: str) -> int:
    """Bytes of a file, -1 if there is none: an image that has been replaced makes another shard."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
