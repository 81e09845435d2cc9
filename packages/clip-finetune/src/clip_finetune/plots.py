"""The ID/OOD plot of WiSE-FT: one curve from the zero-shot star to the fine-tuned diamond."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

_INK, _FAINT, _CHOSEN = "#1b4f8a", "#9ab4d0", "#d1495b"


def plot_curve(result: dict[str, Any], file: Path) -> None:
    """Draw `result` (what `measure_curve` returns) as PNG: ID accuracy against mean OOD accuracy.

    Without OOD sets, against the mean of the control sets. Both axes are logit-scaled, on which
    accuracies under a shift tend to lie on a line.
    """
    points = sorted(result["points"], key=lambda point: point["alpha"])
    role = "ood" if result["ood"] else "control"
    x = [_clip(point["test"]["id"]) for point in points]
    y = [_clip(point["test"][role]) for point in points]
    figure = Figure(figsize=(6.4, 5.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    lines = {
        (kind, name): [_clip(point["test"]["sets"][name]["accuracy"]) for point in points]
        for kind in dict.fromkeys((role, "control"))
        for name in result[kind]
    }
    _logit_axes(axes, x, [*y, *(share for each in lines.values() for share in each)])
    for (kind, name), each in lines.items():
        if (kind, len(result[role])) == (role, 1):
            continue  # the curve itself
        style = "--" if kind == "control" else "-"
        axes.plot(x, each, style, color=_FAINT, linewidth=1, zorder=1)
        axes.annotate(name, (x[-1], each[-1]), (8, 0), fontsize=7, color="#5f7893",
                      textcoords="offset points", va="center", zorder=5,
                      bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5})  # fmt: skip
    axes.plot(x, y, "o-", color=_INK, markersize=4, label="interpolated", zorder=2)
    rows = {point["alpha"]: row for row, point in enumerate(points)}
    for alpha, mark, size, what in ((0, "*", 15, "zero-shot"), (1, "D", 9, "fine-tuned")):
        row = rows[alpha]
        axes.plot(x[row : row + 1], y[row : row + 1], mark, color=_INK, markersize=size,
                  label=f"{what} (alpha {alpha})", zorder=3)  # fmt: skip
    row = rows[result["chosen"]["alpha"]]
    axes.plot(
        x[row], y[row], "o", color="none", markeredgecolor=_CHOSEN, markeredgewidth=2,
        markersize=18, label=_chosen(result), zorder=4,
    )  # fmt: skip
    axes.set_xlabel(f"{_mean_of(result['id'])} (in distribution)")
    axes.set_ylabel(_mean_of(result[role]) + (" (control)" if role == "control" else ""))
    axes.legend(frameon=False, fontsize=8, loc="best", labelspacing=0.9)
    figure.savefig(file, format="png", metadata={"Software": None})


def _chosen(result: dict[str, Any]) -> str:
    """The chosen alpha, and what it gains on both ends on the mean of ID and OOD."""
    text = f"chosen: alpha {result['chosen']['alpha']:g} ({result['rule']})"
    for end, gain in result["chosen"].get("gains", {}).items():
        points, low, high = (100 * gain[key] for key in ("gain", "low", "high"))
        text += f"\n  mean of both {points:+.1f} points ({low:+.1f} to {high:+.1f}) {end}"
    return text


def _mean_of(names: list[str]) -> str:
    return f"accuracy on {names[0]}" if len(names) == 1 else f"mean accuracy on {len(names)} sets"


def _clip(share: float) -> float:
    """Keep 0 and 1, which have no logit, on the plot."""
    return min(max(share, 0.001), 0.999)


def _logit_axes(axes: Axes, x: list[float], y: list[float]) -> None:
    axes.set_xscale("logit")
    axes.set_yscale("logit")
    axes.set_xlim(_limits(x))
    axes.set_ylim(_limits(y))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_percent))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share: float, _position: int | None = None) -> str:
    return f"{round(100 * share, 6):g}%"


def _limits(shares: list[float]) -> tuple[float, float]:
    """A margin on either side, in logits; never narrower than 0.2."""
    logits = [math.log(share / (1 - share)) for share in shares]
    margin = max(0.14 * (max(logits) - min(logits)), 0.1)
    low, high = min(logits) - margin, max(logits) + margin
    return 1 / (1 + math.exp(-low)), 1 / (1 + math.exp(-high))
