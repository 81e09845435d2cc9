"""The law with a floor, E = E0 + a C^b, and whether the points can tell the floor from zero."""

from typing import Any

import numpy as np
from law import LEAST_RUNS, Law
from scipy.optimize import least_squares
from scipy.special import fdtrc

EXACT = 1e-20  # sum of squares below which a curve goes through the points


def saturating(law: Law) -> dict[str, Any]:
    """Bounded least squares of log10 E, and an F test against the law without a floor.

    The floor is identifiable where the law without it fits worse than chance (p < 0.05), which
    needs points that bend.
    """
    x, y, _ = law.chosen
    if law.line is None or len(x) < LEAST_RUNS:
        return {"identifiable": False, "why": f"{len(x)} points; a floor needs {LEAST_RUNS}"}
    centre, least = x.mean(), 10 ** y.min()

    def residuals(p: np.ndarray) -> np.ndarray:
        height, slope, floor = p
        return np.log10(floor + 10 ** (height + slope * (x - centre))) - y

    fits = []
    for share in (0.0, 0.3, 0.6, 0.9):  # the problem has local minima: start low and high
        floor = share * least
        slope, height = np.polyfit(x - centre, np.log10(10**y - floor), 1)
        fits.append(
            least_squares(
                residuals,
                (height, min(slope, -1e-6), floor),
                bounds=((-np.inf, -10, 0), (np.inf, 0, least * (1 - 1e-9))),
                x_scale="jac",
                ftol=1e-15,
                xtol=1e-15,
                gtol=1e-15,
            )
        )
    best = min(fits, key=lambda fit: fit.cost)
    height, slope, floor = (float(v) for v in best.x)
    floor = floor if floor > 1e-9 * least else 0.0
    with_floor = 2 * float(best.cost)
    without = float(((law.line[0] + law.line[1] * x - y) ** 2).sum())
    free = len(x) - 3
    if without < EXACT:
        p = 1.0
    elif with_floor < EXACT:
        p = 0.0
    else:
        p = float(fdtrc(1, free, max(without / with_floor - 1, 0.0) * free))
    told = p < 0.05
    return {
        "floor": floor,
        "prefactor": 10 ** (height - slope * centre),
        "exponent": slope,
        "p": p,
        "identifiable": told,
        "why": f"without a floor it fits {'worse' if told else 'as well'} (F test, p = {p:.2g})",
    }
