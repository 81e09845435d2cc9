"""Which sample is trained on when: a pure function of the seed and the position in the stream.

A stream is endless. Global batch number `step` is its slice `[step * B, (step + 1) * B)`, whatever
the number of processes; a batch at the end of an epoch runs on into the next. The position alone is
enough to resume: nothing is replayed. A stream is made of blocks that draw on few shards each, so
that reads stay local, and a block is computed as a whole from its number.

Random numbers are hashes of counters (splitmix64), not a generator's state: they need no seeding
order and mean the same on every machine and library version.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_train.config import TrainConfig
from clip_train.shards import Data

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


def random_bits(n: int, *key: int) -> NDArray[np.uint64]:
    """The n random uint64 that belong to `key`."""
    return scramble(np.arange(n, dtype=np.uint64) + np.uint64(derive_seed(*key)))


def permutation(n: int, *key: int) -> Ints:
    """The permutation of range(n) that belongs to `key`."""
    return np.argsort(random_bits(n, *key), kind="stable")


def extend_hash(order_hash: str, samples: Ints) -> str:
    """The running hash of all samples so far (hex sha256; "" at the start) after `samples`."""
    chained = bytes.fromhex(order_hash) + samples.astype("<i8").tobytes()
    return hashlib.sha256(chained).hexdigest()


class Stream(ABC):
    """An endless stream of sample numbers over shards of `counts` samples.

    A sample number counts through the shards in their given order: 0 is the first of the first.
    """

    def __init__(self, counts: Sequence[int] | Ints, seed: int) -> None:
        """Args: counts: samples in each shard, not all 0."""
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.first: Ints = np.concatenate([[0], np.cumsum(self.counts)])  # [shards + 1]
        self.seed = seed

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self.first[-1])

    def samples(self, start: int, stop: int) -> Ints:
        """The sample numbers at stream positions [start, stop)."""
        parts: list[Ints] = [np.empty(0, np.int64)]
        while start < stop:
            number, offset = self.locate(start)
            parts.append(self._blocks(number)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def place(self, sample: int) -> tuple[int, int]:
        """The (shard, row) of a sample number."""
        shard = int(self.shards_of(np.array(sample)))
        return shard, sample - int(self.first[shard])

    def shards_of(self, samples: Ints) -> Ints:
        """The shard of each sample number."""
        return np.searchsorted(self.first, samples, side="right") - 1

    @abstractmethod
    def locate(self, position: int) -> tuple[int, int]:
        """The number of the block that holds a stream position, and the position in the block."""

    @abstractmethod
    def block(self, number: int) -> Ints:
        """The sample numbers of a block."""

    # Reading moves forward, so only the last few are in use.

    @cached_property
    def _blocks(self) -> Callable[[int], Ints]:
        return lru_cache(maxsize=4)(self.block)

    def __getstate__(self) -> dict[str, Any]:
        """All but the caches: loader processes that are spawned fill their own."""
        return {name: value for name, value in vars(self).items() if not callable(value)}


class Order(Stream):
    """Epoch after epoch, each holding every sample exactly once.

    An epoch is shuffled on two levels: the shards are permuted and cut into windows of a few
    shards, and the samples of each window, a block, are permuted.
    """

    def __init__(self, counts: Sequence[int] | Ints, seed: int, window: int) -> None:
        """Args: counts: samples in each shard. window: shards shuffled together."""
        super().__init__(counts, seed)
        self.window = window
        self.windows = -(-len(self.counts) // window)

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the block that holds a stream position, and the position in the block."""
        epoch, within = divmod(position, len(self))
        _, ends = self._epochs(epoch)
        number = int(np.searchsorted(ends, within, side="right"))
        return epoch * self.windows + number, within - (int(ends[number - 1]) if number else 0)

    def block(self, number: int) -> Ints:
        """The sample numbers of one window, shuffled."""
        epoch, number = divmod(number, self.windows)
        shards = self._epochs(epoch)[0][number * self.window : (number + 1) * self.window]
        bounds = [(int(self.first[s]), int(self.first[s + 1])) for s in shards]
        samples = np.concatenate([np.arange(first, last) for first, last in bounds])
        return samples[permutation(len(samples), self.seed, epoch, number)]

    @cached_property
    def _epochs(self) -> Callable[[int], tuple[Ints, Ints]]:
        return lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """(the epoch's order of shards, the position in the epoch at which each window ends)."""
        shards = permutation(len(self.counts), self.seed, epoch)
        starts = np.arange(0, len(shards), self.window)
        return shards, np.cumsum(np.add.reduceat(self.counts[shards], starts))


class Replacement(Stream):
    """Samples drawn with replacement, each as probable as any other at every position.

    Each block draws `window` shards, with replacement and with probability n_s / N in proportion to
    their samples. A position draws one of these, each as probable, then one of its rows, each as
    probable. Whichever draw of a shard it takes, that is shard s with probability n_s / N, and one
    of its rows then has 1 / n_s: a sample has probability n_s / N x 1 / n_s = 1 / N. Positions of
    one block share its shards; those of different blocks are independent.
    """

    def __init__(self, counts: Sequence[int] | Ints, seed: int, window: int) -> None:
        """Args: counts: samples in each shard. window: shards in a block."""
        super().__init__(counts, seed)
        self.window = window
        filled = int(np.count_nonzero(self.counts))
        self.all_fit = window >= filled  # a block may draw on every shard: no need to choose some
        self.length = max(1, min(window, filled) * len(self) // filled)  # of a block

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the block that holds a stream position, and the position in the block."""
        return divmod(position, self.length)

    def block(self, number: int) -> Ints:
        """The sample numbers drawn in one block."""
        if self.all_fit:
            return _below(len(self), random_bits(self.length, self.seed, number))
        # the shard of a sample drawn from all: in proportion to its samples
        shards = self.shards_of(_below(len(self), random_bits(self.window, self.seed, number, 0)))
        slots = _below(self.window, random_bits(self.length, self.seed, number, 1))
        chosen = shards[slots]
        rows = _below(self.counts[chosen], random_bits(self.length, self.seed, number, 2))
        return self.first[chosen] + rows


def _below(limit: int | Ints, bits: NDArray[np.uint64]) -> Ints:
    """Numbers in [0, limit) from random bits; the bias of the remainder is below limit / 2**64."""
    return (bits % np.asarray(limit, np.uint64)).astype(np.int64)


class Mixture(Stream):
    """Several sources, each with a share in proportion to its samples times its factor.

    The k-th draw from a source is the k-th sample of a stream of its own, so that an `Order` shows
    each of its samples once in its own epochs. In each block of fixed length a source has its share
    of the positions, to within a few, and exactly so in the long run; which ones is permuted.
    """

    LENGTH = 1000  # of a block

    def __init__(
        self,
        counts: Sequence[int] | Ints,
        seed: int,
        window: int,
        *,
        sources: Sequence[int],
        weights: Sequence[float],
        kind: type[Order] | type[Replacement] = Order,
    ) -> None:
        """Args: counts: of the shards of one source after another. window: shards open at once,
        shared out among the sources. sources: shards in each. weights: factor of each.
        """
        super().__init__(counts, seed)
        ends = np.cumsum(sources)
        self.offsets = [int(self.first[end - n]) for end, n in zip(ends, sources, strict=True)]
        parts = np.split(self.counts, ends[:-1])
        amounts = [Fraction(w) * int(n.sum()) for w, n in zip(weights, parts, strict=True)]
        self.sources = [
            kind(part, derive_seed(seed, i), max(1, round(window * amount / sum(amounts))))
            for i, (part, amount) in enumerate(zip(parts, amounts, strict=True))
        ]
        # of what the sources before it leave; the last takes it all
        self.shares = [amount / sum(amounts[i:]) for i, amount in enumerate(amounts)]

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the block that holds a stream position, and the position in the block."""
        return divmod(position, self.LENGTH)

    def block(self, number: int) -> Ints:
        """The sample numbers of one block."""
        starts, stops = self.drawn(number), self.drawn(number + 1)
        samples = np.concatenate(
            [
                source.samples(start, stop) + offset
                for source, offset, start, stop in zip(
                    self.sources, self.offsets, starts, stops, strict=True
                )
            ]
        )
        # each position's source, and the positions of each source in order
        owners = np.repeat(np.arange(len(self.sources)), np.subtract(stops, starts))
        owners = owners[permutation(self.LENGTH, self.seed, number)]
        block = np.empty_like(samples)
        block[np.argsort(owners, kind="stable")] = samples
        return block

    def drawn(self, number: int) -> list[int]:
        """How often each source has been drawn before a block: rounded down, in exact fractions.

        No source's number ever falls from block to block, since what is left for it does not.
        """
        left = number * self.LENGTH
        drawn: list[int] = []
        for share in self.shares:
            drawn.append(floor(left * share))
            left -= drawn[-1]
        return drawn


def make_stream(data: Data, config: TrainConfig) -> Stream:
    """The stream of --seed, --shuffle-shards, --replacement and, where given, --train-weights."""
    kind = Replacement if config.replacement else Order
    counts, seed, window = data.counts, config.seed, config.shuffle_shards
    if data.weights is None:
        return kind(counts, seed, window)
    sources, weights = data.sources, data.weights
    return Mixture(counts, seed, window, sources=sources, weights=weights, kind=kind)
