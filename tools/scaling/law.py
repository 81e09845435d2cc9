"""The power law through a set of runs: choosing points, least squares, resampling the runs.

Everything works on many tables at once, so that one function fits the runs and every
resampling of them.
"""

# B tables (replicates), R runs of a table, K points that carry a line; x log10 compute, y log10 E

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from errors import ScalingError
from numpy.typing import NDArray
from points import Point, distinct
from scipy.special import ndtr, stdtrit
from settings import Settings

Floats = NDArray[np.float64]
LEAST_RUNS = 5  # no interval below this many
LEAST_SPREAD = 1e-4  # sum of squared decades of compute, below which no slope can be told


def select(
    x_BR: Floats, y_BR: Floats, rule: str, bins: int, edge: float
) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """The points that carry the law, with the run that each one is: (x_BK, y_BK, run_BK).

    `all`: every run. `pareto`: the runs that no run of as little compute equals or beats.
    `binned` (the paper's): equal bins of [least x, greatest x + edge]; of each the lowest y, at
    the bin's centre. A run of -1 marks a place that is not filled.
    """
    if rule == "all":
        return x_BR, y_BR, np.broadcast_to(np.arange(x_BR.shape[1]), x_BR.shape)
    if rule == "pareto":
        order = np.lexsort((y_BR, x_BR), axis=-1)
        x, y = (np.take_along_axis(a, order, axis=1) for a in (x_BR, y_BR))
        best = np.minimum.accumulate(y, axis=1)
        before = np.concatenate([np.full_like(y[:, :1], np.inf), best[:, :-1]], axis=1)
        return x, y, np.where(y < before, order, -1)
    low = x_BR.min(axis=1, keepdims=True)
    width = (x_BR.max(axis=1, keepdims=True) + edge - low) / bins
    inner = low[:, :, None] + width[:, :, None] * np.arange(1, bins)
    bin_BR = (x_BR[:, :, None] >= inner).sum(axis=2)
    in_bin_BRK = np.where(bin_BR[:, :, None] == np.arange(bins), y_BR[:, :, None], np.inf)
    run = in_bin_BRK.argmin(axis=1)
    y = in_bin_BRK.min(axis=1)
    return low + width * (np.arange(bins) + 0.5), y, np.where(np.isfinite(y), run, -1)


def least_squares(
    x_BK: Floats, y_BK: Floats, run_BK: NDArray[np.intp]
) -> tuple[Floats, Floats, Floats]:
    """Height at x = 0, slope and the points' mean x, [B] each; NaN where no slope can be told."""
    used = run_BK >= 0
    count = used.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        x_mean = np.where(used, x_BK, 0).sum(axis=1) / count
        y_mean = np.where(used, y_BK, 0).sum(axis=1) / count
        dx = np.where(used, x_BK - x_mean[:, None], 0)
        dy = np.where(used, y_BK - y_mean[:, None], 0)
        spread = (dx * dx).sum(axis=1)
        slope = (dx * dy).sum(axis=1) / spread
    slope = np.where((count >= 3) & (spread > LEAST_SPREAD), slope, np.nan)
    return y_mean - slope * x_mean, slope, x_mean


def interval(values: Floats, runs: int) -> tuple[float, float]:
    """The 95% interval of resampled values: percentiles, wider where runs are few.

    A resampling of n runs scatters less than new runs would, by sqrt(n / (n - 1)), and few runs
    have the tails of Student's t. The percentiles are taken that much further out: Hesterberg
    2015, "What teachers should know about the bootstrap", expanded percentile interval.
    """
    tail = float(ndtr(-np.sqrt(runs / (runs - 1)) * stdtrit(runs - 1, 0.975)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def power(log: float) -> float:
    """10 to this power, at most 1e308: a steep line reaches further at a compute of 1."""
    return 10.0 ** min(log, 308.0)


@dataclass(frozen=True)
class Law:
    """E = prefactor * compute^exponent of one quantity and one group of runs."""

    quantity: str
    group: str
    points: tuple[Point, ...]
    settings: Settings

    @cached_property
    def log_compute(self) -> Floats:
        """[R]"""
        return np.log10([p.compute for p in self.points])

    @cached_property
    def log_errors(self) -> Floats:
        """[R]"""
        return np.log10([p.error for p in self.points])

    def select(self, x_BR: Floats, y_BR: Floats) -> tuple[Floats, Floats, NDArray[np.intp]]:
        """The points that carry the law, by this law's rule."""
        return select(x_BR, y_BR, self.rule, self.settings.bins, self.settings.edge)

    @property
    def rule(self) -> str:
        """How points are chosen; no more runs than bins are all taken, as the paper does."""
        few = self.settings.points == "binned" and len(self.points) <= self.settings.bins
        return "all" if few else self.settings.points

    @cached_property
    def chosen(self) -> tuple[Floats, Floats, list[int]]:
        """x and y of the points that carry the law, and which runs they are."""
        x, y, run = (a[0] for a in self.select(self.log_compute[None], self.log_errors[None]))
        return x[run >= 0], y[run >= 0], [int(r) for r in run[run >= 0]]

    @cached_property
    def line(self) -> tuple[float, float] | None:
        """(height at x = 0, slope); None below three points or LEAST_SPREAD."""
        x, y, runs = self.chosen
        height, slope, _ = least_squares(x[None], y[None], np.array([runs]))
        return None if np.isnan(slope[0]) else (float(height[0]), float(slope[0]))

    def at(self, x: float) -> float:
        """log10 E that the line gives at log10 compute `x`."""
        if self.line is None:
            raise ValueError("no line")
        return self.line[0] + self.line[1] * x

    def resampled(self, rule: str | None = None) -> tuple[Floats, Floats] | None:
        """Heights and slopes of resamplings of the runs, the choice of points done anew.

        None where no interval can be given: below five runs or points, or where more than a
        twentieth of the resamplings leave fewer than three points.
        """
        s = self.settings
        runs, rule = len(self.points), rule or self.rule
        points = runs if rule == "all" else len(self.chosen[2])
        if not s.bootstrap or min(runs, points) < LEAST_RUNS:
            return None
        # a stream of its own for each law: a law's interval does not hang on its neighbours
        rng = np.random.default_rng([s.seed, zlib.crc32(f"{self.quantity}|{self.group}".encode())])
        draw_BR = rng.integers(runs, size=(s.bootstrap, runs))
        y_BR = self._with_noise(rng, draw_BR)
        chosen = select(self.log_compute[draw_BR], y_BR, rule, s.bins, s.edge)
        height, slope, _ = least_squares(*chosen)
        valid = ~np.isnan(slope)
        if valid.mean() < 0.95:
            return None
        return height[valid], slope[valid]

    @cached_property
    def replicates(self) -> tuple[Floats, Floats] | None:
        return self.resampled()

    def _with_noise(self, rng: np.random.Generator, draw_BR: NDArray[np.intp]) -> Floats:
        """log10 E of the drawn runs; drawn anew from a binomial where n_eval is known."""
        n_R = np.array([p.n_eval or 0 for p in self.points])
        if not n_R.any():
            return self.log_errors[draw_BR]
        error_R = np.array([p.error for p in self.points])
        n_BR = n_R[draw_BR]
        wrong = rng.binomial(n_BR, error_R[draw_BR])
        with np.errstate(divide="ignore", invalid="ignore"):
            y_BR = np.log10(np.maximum(wrong, 0.5) / n_BR)
        return np.where(n_BR > 0, y_BR, self.log_errors[draw_BR])

    def interval_at(self, x: float) -> tuple[float, float] | None:
        """The 95% interval of the law's E at log10 compute `x`; a new run scatters around it."""
        if self.replicates is None:
            return None
        height, slope = self.replicates
        low, high = interval(height + slope * x, len(self.points))
        return power(low), power(high)


def laws(points: Sequence[Point], settings: Settings) -> list[Law]:
    """A law for every quantity and every value of the column `settings.by`, in the table's order.

    Raises:
        ScalingError: fewer than three distinct computes.
    """
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        value = "all" if settings.by == "none" else str(getattr(point, settings.by))
        groups.setdefault((point.quantity, value), []).append(point)
    for (quantity, group), members in groups.items():
        computes = distinct(p.compute for p in members)
        if computes < 3:
            raise ScalingError(
                f"{quantity}, {settings.by} {group}: {computes} distinct computes "
                f"({', '.join(p.run for p in members)}); a law needs three"
            )
    return [Law(q, g, tuple(members), settings) for (q, g), members in groups.items()]
