"""Which runs are best for their compute, and what holds the others back."""

import math
from collections.abc import Sequence
from typing import Any

from points import Point

SAME = 0.1  # decades of samples seen within which two runs count as equally long


def frontier(points: Sequence[Point], margin: float) -> list[dict[str, Any]]:
    """For every quantity and group: the Pareto-optimal runs, and the others with what limits them.

    A run off the frontier is held back by
        data: the same model, as long, does better on other data;
        samples: a smaller model on the same data, seeing more, does better for no more compute;
        model: a larger model on the same data, seeing less, does better for no more compute.
    Each names the best such run. Better means an error lower by more than `margin`.
    """
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.quantity, point.group), []).append(point)
    result = []
    for (quantity, group), runs in groups.items():
        best = pareto(runs)
        off = [_held_back(p, runs, best, margin) for p in runs if p not in best]
        result.append(
            {
                "quantity": quantity,
                "group": group,
                "frontier": [
                    {"run": p.run, "compute": float(f"{p.compute:.6g}"), "error": _tidy(p.error)}
                    for p in best
                ],
                "off": off,
                "limits": {
                    kind: sum(kind in row["limits"] for row in off)
                    for kind in ("data", "samples", "model")
                },
            }
        )
    return result


def pareto(runs: Sequence[Point]) -> list[Point]:
    """The runs that no run of as little compute equals or beats, cheapest first."""
    best: list[Point] = []
    for point in sorted(runs, key=lambda p: (p.compute, p.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def _held_back(
    point: Point, runs: Sequence[Point], best: Sequence[Point], margin: float
) -> dict[str, Any]:
    better = [p for p in runs if p.error < point.error - margin]
    kin = [p for p in better if p.data == point.data and p.compute <= point.compute]
    alike = [
        p
        for p in better
        if p.model == point.model
        and p.data != point.data
        and abs(math.log10(p.samples_seen / point.samples_seen)) <= SAME
    ]
    candidates = {
        "data": alike,
        "samples": [p for p in kin if p.gmacs < point.gmacs],
        "model": [p for p in kin if p.gmacs > point.gmacs],
    }
    reached = min(p.error for p in best if p.compute <= point.compute)
    return {
        "run": point.run,
        "compute": float(f"{point.compute:.6g}"),
        "error": _tidy(point.error),
        "above_frontier": _tidy(point.error - reached),
        "limits": {
            kind: min(found, key=lambda p: p.error).run
            for kind, found in candidates.items()
            if found
        },
    }


def _tidy(error: float) -> float:
    """Six decimals: 1 - 0.7797 is 0.2203."""
    return round(error, 6)
