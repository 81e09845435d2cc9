"""Hashes a few bits apart, found exactly and without comparing all pairs, in memory linear in them.

N hashes, Q queries, P pairs; a hash is a uint64
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_BITS = 64
_PAIRS = 1 << 20  # compared at a time
_QUERIES = 1024  # looked up at a time
_HIGH, _LOW = np.uint64(32), np.uint64(2**32 - 1)  # of a chunk with a number below it


def has_information(hashes_N: Hashes) -> NDArray[np.bool_]:
    """Whether more than one bit is set.

    pHash compares 64 frequencies with their median. Of a picture of one colour all but the first
    are zero, so no more than one bit is set; of any other about half are.
    """
    return np.bitwise_count(hashes_N) > 1


def first_that_stay(hashes_N: Hashes, distance: int) -> Numbers:
    """For each hash the number of the first one within `distance` that stays; its own, if it stays.

    Greedy, in the order of the hashes: one goes if an earlier one that stays is within `distance`.
    """
    first_U, place_N, hashes_U = _distinct(hashes_N)
    index = HashIndex(hashes_U, distance)
    leader_U = np.arange(len(hashes_U))
    for begin in range(0, len(hashes_U), _QUERIES):
        end = min(begin + _QUERIES, len(hashes_U))
        inside: list[Numbers] = []  # pairs of this block, (later, earlier)
        for query_P, number_P, _ in index.pairs(hashes_U[begin:end], end):
            stays_P = leader_U[number_P] == number_P
            before_P = stays_P & (number_P < begin)
            np.minimum.at(leader_U, begin + query_P[before_P], number_P[before_P])
            among_P = (number_P >= begin) & (number_P < begin + query_P)
            inside.append(np.stack([begin + query_P[among_P], number_P[among_P]], axis=1))
        for later, earlier in np.unique(np.concatenate(inside), axis=0).tolist():
            if leader_U[later] == later and leader_U[earlier] == earlier:
                leader_U[later] = earlier
    return first_U[leader_U[place_N]]


def nearest(
    queries_Q: Hashes, hashes_N: Hashes, distance: int
) -> tuple[Numbers, NDArray[np.bool_]]:
    """For each query the number of the nearest hash within `distance`, the first of equals, or -1.

    And for each hash, whether any query is within `distance` of it.
    """
    first_U, place_N, hashes_U = _distinct(hashes_N)
    index = HashIndex(hashes_U, distance)
    distinct, place_Q = np.unique(queries_Q, return_inverse=True)
    far = np.iinfo(np.int64).max
    best = np.full(len(distinct), far)  # bits apart, then number
    found_U = np.zeros(len(hashes_U), bool)
    for begin in range(0, len(distinct), _QUERIES):
        for query_P, number_P, apart_P in index.pairs(distinct[begin : begin + _QUERIES]):
            np.minimum.at(best, begin + query_P, apart_P << 40 | first_U[number_P])
            found_U[number_P] = True
    return np.where(best == far, -1, best & ((1 << 40) - 1))[place_Q], found_U[place_N]


class HashIndex:
    """Distinct hashes, at most 2^32, sorted by each of distance + 1 chunks of their bits.

    Of two hashes at most `distance` bits apart at least one chunk is the same (pigeonhole).
    """

    def __init__(self, hashes_N: Hashes, distance: int) -> None:
        self._hashes_N, self._distance = hashes_N, distance
        # Two chunks at least: a chunk of no more than 32 bits has place for a number beside it.
        edges = np.linspace(0, _BITS, max(distance, 1) + 2).astype(np.uint64)
        self._chunks = list(zip(edges, np.diff(edges), strict=False))
        numbers_N = np.arange(len(hashes_N), dtype=np.uint64)
        self._sorted = [
            np.sort(_chunk(hashes_N, *chunk) << _HIGH | numbers_N) for chunk in self._chunks
        ]

    def pairs(
        self, queries_Q: Hashes, stop: int = 1 << 32
    ) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """Pairs within the distance: the number of the query, that of the hash, the bits apart.

        Only hashes of a lower number than `stop` count. Pairs come a bounded number at a time, in
        no order, and one may come several times.
        """
        for chunk, sorted_N in zip(self._chunks, self._sorted, strict=True):
            low_Q = _chunk(queries_Q, *chunk) << _HIGH
            start_Q = np.searchsorted(sorted_N, low_Q)
            end_Q = np.cumsum(
                np.searchsorted(sorted_N, low_Q | np.uint64(stop - 1), "right") - start_Q
            )
            shift_Q = start_Q - np.concatenate([[0], end_Q[:-1]])
            for begin in range(0, int(end_Q[-1]), _PAIRS):
                pair_P = np.arange(begin, min(begin + _PAIRS, int(end_Q[-1])))
                query_P = np.searchsorted(end_Q, pair_P, "right")
                number_P = (sorted_N[pair_P + shift_Q[query_P]] & _LOW).astype(np.int64)
                differ_P = self._hashes_N[number_P] ^ queries_Q[query_P]
                apart_P = np.bitwise_count(differ_P).astype(np.int64)
                near_P = apart_P <= self._distance
                yield query_P[near_P], number_P[near_P], apart_P[near_P]


def _distinct(hashes_N: Hashes) -> tuple[Numbers, Numbers, Hashes]:
    """Where each distinct hash U comes first, in that order; the U of each N; the hashes U."""
    hashes_U, first_U, place_N = np.unique(hashes_N, return_index=True, return_inverse=True)
    order_U = np.argsort(first_U)
    rank_U = np.empty_like(order_U)
    rank_U[order_U] = np.arange(len(order_U))
    return first_U[order_U], rank_U[place_N], hashes_U[order_U]


def _chunk(hashes: Hashes, begin: np.uint64, width: np.uint64) -> Hashes:
    return hashes >> begin & (np.uint64(1) << width) - np.uint64(1)
