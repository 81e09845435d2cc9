"""From right and wrong answers to points of a curve with intervals, and to the alpha of choice."""

# A alphas, N images of a set

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_finetune.config import FIXED_ALPHA, CurveConfig
from clip_finetune.scoring import Hits

_Z = 1.959964  # 95%


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson, 1927)."""
    share, spread = hits / count, _Z * _Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


class Scores:
    """Right answers by role ("id", "ood", "control") and set of one split."""

    def __init__(self, hits: dict[str, dict[str, Hits]]) -> None:
        self.hits = {role: sets for role, sets in hits.items() if sets}

    def point(self, number: int) -> dict[str, Any]:
        """Of one alpha: `sets`, with Wilson's interval each; the mean over the sets of each role;
        `mean`, halfway between ID and OOD, with the interval that its images give."""
        sets: dict[str, Any] = {}
        for of_role in self.hits.values():
            for name, hits_AN in of_role.items():
                right, count = int(hits_AN[number].sum()), hits_AN.shape[1]
                low, high = wilson(right, count)
                sets[name] = {"accuracy": right / count, "low": low, "high": high}
        point: dict[str, Any] = {"sets": sets}
        for role, of_role in self.hits.items():
            point[role] = sum(sets[name]["accuracy"] for name in of_role) / len(of_role)
        if "ood" in point and "id" in point:
            point["mean"] = (point["id"] + point["ood"]) / 2
            half = _Z * self._error([hits_AN[number] for hits_AN in self._both()])
            point["mean_interval"] = [point["mean"] - half, point["mean"] + half]
        return point

    def gain(self, number: int, end: int) -> dict[str, float]:
        """The mean of ID and OOD at one alpha less that at another, on the same images.

        Its 95% interval is of the paired differences: most images are right or wrong at both.
        """
        paired = [hits_AN[number] * 1.0 - hits_AN[end] for hits_AN in self._both()]
        shares = self._shares()
        gain = sum(share * float(d.mean()) for share, d in zip(shares, paired, strict=True))
        half = _Z * self._error(paired)
        return {"gain": gain, "low": gain - half, "high": gain + half}

    def _both(self) -> list[Hits]:
        return [*self.hits["id"].values(), *self.hits["ood"].values()]

    def _shares(self) -> list[float]:
        """Each set's share in the mean of ID and OOD."""
        return [1 / (2 * len(self.hits[role])) for role in ("id", "ood") for _ in self.hits[role]]

    def _error(self, values: Sequence[Any]) -> float:
        """Standard error of the mean of ID and OOD; the sets are samples of their own."""
        pairs = zip(self._shares(), values, strict=True)
        return math.sqrt(sum(share**2 * float(np.var(v)) / len(v) for share, v in pairs))


def choose(points: list[dict[str, Any]], config: CurveConfig) -> dict[str, Any]:
    """The point of the rule; on validation the smallest alpha of equals: nearest to zero-shot.

    With control sets only alphas at which each loses at most `max_loss` points against alpha 0
    (patching, 2208.05592); alpha 0 itself always does.
    """
    if config.rule == "fixed":
        return next(point for point in points if point["alpha"] == FIXED_ALPHA)
    key = "id" if config.rule == "best-id" else "mean"
    ordered = sorted(points, key=lambda point: point["alpha"])
    start = next(point for point in points if point["alpha"] == 0)
    names = [path.resolve().name for path in config.control]

    def keeps(point: dict[str, Any]) -> bool:
        before, after = start["validation"]["sets"], point["validation"]["sets"]
        lost = [before[name]["accuracy"] - after[name]["accuracy"] for name in names]
        return all(100 * loss <= config.max_loss + 1e-9 for loss in lost)

    return max(filter(keeps, ordered), key=lambda point: point["validation"][key])
