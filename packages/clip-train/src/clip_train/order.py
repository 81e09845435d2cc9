"""Which sample is trained on when: a pure function of the seed and the position in the stream.

The stream is endless, epoch after epoch, and each epoch holds every sample exactly once. Its order
is shuffled on two levels so that reads stay local: the shards are permuted, cut into windows of a
few shards, and the samples of each window are permuted. Global batch number `step` is the slice
`[step * B, (step + 1) * B)` of the stream, whatever the number of processes; a batch at the end of
an epoch runs on into the next. The position alone is enough to resume: nothing is replayed.

Random numbers are hashes of counters (splitmix64), not a generator's state: they need no seeding
order and mean the same on every machine and library version.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function: a bijection of uint64 that looks random (Steele 2014)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on all of `parts` and their order."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = scramble(state ^ scramble(np.array([part], np.uint64)))
    return int(state[0] >> np.uint64(1))


def permutation(n: int, *key: int) -> Ints:
    """The permutation of range(n) that belongs to `key`."""
    start = np.uint64(derive_seed(*key))
    return np.argsort(scramble(np.arange(n, dtype=np.uint64) + start), kind="stable")


def extend_hash(order_hash: str, samples: Ints) -> str:
    """The running hash of all samples so far (hex sha256; "" at the start) after `samples`."""
    chained = bytes.fromhex(order_hash) + samples.astype("<i8").tobytes()
    return hashlib.sha256(chained).hexdigest()


class Order:
    """The stream of sample numbers over shards of `counts` samples.

    A sample number counts through the shards in their given order: 0 is the first of the first.
    """

    def __init__(self, counts: Sequence[int] | Ints, seed: int, window: int) -> None:
        """Args: counts: samples in each shard. window: shards shuffled together."""
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.first: Ints = np.concatenate([[0], np.cumsum(self.counts)])  # [shards + 1]
        self.seed = seed
        self.window = window

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self.first[-1])

    def samples(self, start: int, stop: int) -> Ints:
        """The sample numbers at stream positions [start, stop)."""
        parts: list[Ints] = [np.empty(0, np.int64)]
        while start < stop:
            epoch, within = divmod(start, len(self))
            _, ends = _epoch(self, epoch)
            number = int(np.searchsorted(ends, within, side="right"))
            offset = within - (int(ends[number - 1]) if number else 0)
            parts.append(_window(self, epoch, number)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def place(self, sample: int) -> tuple[int, int]:
        """The (shard, row) of a sample number."""
        shard = int(np.searchsorted(self.first, sample, side="right")) - 1
        return shard, sample - int(self.first[shard])


# Reading moves forward, so only the last few are in use.


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[Ints, Ints]:
    """(the epoch's order of shards, the position in the epoch at which each window ends)."""
    shards = permutation(len(order.counts), order.seed, epoch)
    starts = np.arange(0, len(shards), order.window)
    return shards, np.cumsum(np.add.reduceat(order.counts[shards], starts))


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, number: int) -> Ints:
    """The sample numbers of one window, shuffled."""
    shards = _epoch(order, epoch)[0][number * order.window : (number + 1) * order.window]
    bounds = [(int(order.first[s]), int(order.first[s + 1])) for s in shards]
    samples = np.concatenate([np.arange(first, last) for first, last in bounds])
    return samples[permutation(len(samples), order.seed, epoch, number)]
