"""Nested random subsets: the data axis of a scaling study (80M samples within 400M).

Every sample has a rank, a 64-bit hash; the subset is the samples of least rank. So a subset is
exact, depends on nothing but the source and the seed, and lies within every larger one.
"""

# N samples of a shard

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from upath import UPath

from clip_data.errors import DataError
from clip_data.selection import Selected, source_tars, write_selection
from clip_data.sidecars import count_samples, read_keys
from clip_data.workers import run_jobs

Ranks = NDArray[np.uint64]
Result = TypeVar("Result")

_BITS = 12  # buckets of the first pass: of 400M samples one holds 100,000
_SHIFT = np.uint64(64 - _BITS)


def subset(
    source: str | Path | UPath,
    output: str | Path | UPath,
    *,
    samples: int,
    by: str = "sample",
    seed: int = 0,
    workers: int | None = None,
) -> Selected:
    """Write `samples` samples of the source, chosen at random; subsets of one seed are nested.

    Args:
        source: a folder of shards, with sidecars or without.
        output: the folder of the new shards.
        samples: how many, exactly.
        by: "sample": each sample for itself, so every shard is written anew. "shard": whole shards,
            which are linked, and a part of one more. That is as random as the order in which the
            source was built: right if its rows were shuffled then.
        seed: another seed, another subset.
        workers: processes; None for one per core.

    Raises:
        DataError: the source has fewer samples, or see `write_selection`.
    """
    if samples < 1:
        raise DataError(f"{samples} samples of {source}: expected at least one")
    if by not in ("sample", "shard"):
        raise DataError(f"by {by!r}: expected 'sample' or 'shard'")
    source, output = UPath(source), UPath(output)
    tars = source_tars(source)
    if by == "sample":
        keep = _least_ranks(tars, seed, samples, min(workers or os.cpu_count() or 1, len(tars)))
    else:
        keep = _least_shards(tars, seed, samples)
    arguments = {"command": "subset", "samples": samples, "by": by, "seed": seed}
    return write_selection(source, output, keep, arguments=arguments, workers=workers)


def rank_samples(tar: UPath, keys: list[str], seed: int) -> Ranks:
    """The ranks of a shard's samples [N].

    The name of the shard is hashed too: tars of other makers may all have the same keys.
    """
    head = f"{seed} {tar.name} ".encode("utf-8", "surrogateescape")
    hashes = (blake2b(head + k.encode("utf-8", "surrogateescape"), digest_size=8) for k in keys)
    return np.frombuffer(b"".join(h.digest() for h in hashes), ">u8").astype(np.uint64)


# By sample ----------------------------------------------------------------------------------------


def _threshold(tars: list[UPath], seed: int, samples: int, workers: int) -> tuple[np.uint64, int]:
    """The greatest rank in the subset, and how many samples of that very rank are in it.

    A first pass tells the bucket it is in, a second the rank itself: memory is bounded.
    """
    counts = np.zeros(1 << _BITS, np.int64)
    for shard in _pass(partial(_count_buckets, seed=seed), tars, workers, "count"):
        counts += shard
    ends = counts.cumsum()
    if samples > ends[-1]:
        raise _too_few(tars, int(ends[-1]), samples)
    bucket = int(np.searchsorted(ends, samples))
    inside = samples - int(ends[bucket] - counts[bucket])
    passed = _pass(partial(_bucket_ranks, seed=seed, bucket=bucket), tars, workers, "rank")
    ranks = np.sort(np.concatenate(list(passed)))
    threshold = ranks[inside - 1]
    return threshold, inside - int(np.searchsorted(ranks, threshold))


def _count_buckets(tar: UPath, seed: int) -> NDArray[np.int64]:
    buckets = rank_samples(tar, read_keys(tar), seed) >> _SHIFT
    return np.bincount(buckets.astype(np.int64), minlength=1 << _BITS)


def _bucket_ranks(tar: UPath, seed: int, bucket: int) -> Ranks:
    ranks = rank_samples(tar, read_keys(tar), seed)
    return ranks[ranks >> _SHIFT == bucket]


def _pass(
    function: Callable[[UPath], Result], tars: list[UPath], workers: int, name: str
) -> Iterator[Result]:
    with closing(run_jobs(function, tars, workers)) as results:
        yield from tqdm(results, name, total=len(tars), unit="shard", disable=None)


def _least_ranks(
    tars: list[UPath], seed: int, samples: int, workers: int
) -> Iterator[tuple[UPath, frozenset[str]]]:
    """Where ranks are equal, in the order of the shards."""
    threshold, ties = _threshold(tars, seed, samples, workers)
    for tar in tars:
        keys = read_keys(tar)
        ranks = rank_samples(tar, keys, seed)
        stays = ranks < threshold
        tied = np.flatnonzero(ranks == threshold)[:ties]
        stays[tied] = True
        ties -= len(tied)
        yield tar, frozenset(compress(keys, stays))


# By shard -----------------------------------------------------------------------------------------


def _least_shards(
    tars: list[UPath], seed: int, samples: int
) -> list[tuple[UPath, frozenset[str] | None]]:
    keep: dict[str, frozenset[str] | None] = {}
    left = samples
    for tar in sorted(tars, key=lambda tar: rank_samples(tar, [""], seed)[0]):
        count = count_samples(tar)
        if count > left:
            keys = read_keys(tar)
            least = np.argsort(rank_samples(tar, keys, seed), kind="stable")[:left]
            keep[tar.name] = frozenset(keys[row] for row in least)
        else:
            keep[tar.name] = None if count else frozenset()
        left -= min(count, left)
        if not left:
            break
    if left:
        raise _too_few(tars, samples - left, samples)
    return [(tar, keep.get(tar.name, frozenset())) for tar in tars]


def _too_few(tars: list[UPath], found: int, samples: int) -> DataError:
    return DataError(f"{tars[0].parent}: {found} samples, {samples} asked for; ask for no more")
