"""Counts in bounded memory: histograms, and how often each of any number of texts is there."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

DISTINCT = 200_000  # texts that a count knows at a time
_BINS = 30
_PER_OCTAVE = 4  # bins from a size to its double


@dataclass(frozen=True)
class Histogram:
    """counts[i] values are in edges[i] <= value < edges[i + 1]; the last bin has all above, too."""

    unit: str
    edges: list[float]
    counts: list[int]
    smallest: float
    mean: float
    largest: float


class Values:
    """A histogram in the making: whole numbers one by one, or sizes by bins of equal ratio."""

    def __init__(self, unit: str, *, ratio: bool) -> None:
        self.unit, self.ratio = unit, ratio
        self.counts = Counter[int]()
        self.sum, self.smallest, self.largest = 0.0, math.inf, -math.inf

    def add(self, value: float) -> None:
        """Count a value; in ratio, one above 0."""
        place = math.floor(_PER_OCTAVE * math.log2(value)) if self.ratio else min(value, 10_000)
        self.counts[int(place)] += 1
        self.sum += value
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)

    def merge(self, other: "Values") -> None:
        """Add the values of another."""
        self.counts.update(other.counts)
        self.sum += other.sum
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)

    def histogram(self) -> Histogram | None:
        """None if there are no values."""
        if not self.counts:
            return None
        places = sorted(self.counts)
        low, high, width, total = places[0], places[-1], 1, self.counts.total()
        if not self.ratio:  # up to the 99th percentile, in steps of 1, 2, 5, 10, 20, …
            ranks = accumulate(self.counts[place] for place in places)
            high = next(p for p, rank in zip(places, ranks, strict=True) if rank >= 0.99 * total)
            steps = (digit * 10**power for power in range(5) for digit in (1, 2, 5))
            width = next(step for step in steps if high // step - low // step < _BINS)
        first, last = low // width, high // width
        counts = [0] * (last - first + 1)
        for place, count in self.counts.items():
            counts[min(place // width, last) - first] += count
        edges = [float(step * width) for step in range(first, last + 2)]
        if self.ratio:
            edges = [round(2 ** (edge / _PER_OCTAVE), 4) for edge in edges]
        mean = round(self.sum / total, 4)
        return Histogram(self.unit, edges, counts, self.smallest, mean, self.largest)


def count_texts(counter: Counter[str], more: Iterable[str]) -> None:
    """Add; when there are too many different ones, forget the rarer half."""
    counter.update(more)
    if len(counter) > DISTINCT:
        common = counter.most_common(DISTINCT // 2)
        counter.clear()
        counter.update(dict(common))
