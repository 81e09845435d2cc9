"""Accuracy under distribution shift: the drop, and the part of it that a baseline explains.

Effective robustness (Taori et al., 2007.00644): the accuracy on the shifted set beyond what models
of that accuracy on the base set usually have there. The usual is a line through the baseline
models, fitted to logits of accuracies by least squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from clip_probe.averages import average
from clip_probe.errors import ProbeError

EDGE = 1e-3  # accuracies of 0 and 1 have no logit
Scores = Mapping[str, Mapping[str, float]]  # accuracy by model, then by set


@dataclass(frozen=True)
class Line:
    """logit(shifted accuracy) = slope * logit(base accuracy) + intercept."""

    slope: float
    intercept: float

    def __call__(self, base: float) -> float:
        """The usual accuracy on the shifted set."""
        return 1 / (1 + exp(-self.slope * logit(base) - self.intercept))


def robustness(
    scores: Scores, base: str, shifted: Sequence[str], baseline: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row for each model that has all the sets.

    Args:
        scores: top-1 accuracies by model and set.
        base: the set that the others are shifted from.
        shifted: those others.
        baseline: models that say what is usual, two or more; without them, effective robustness
            is None.

    Raises:
        ProbeError: no shifted set, no model has all sets, a baseline model lacks some or is the
            only one.
    """
    if not shifted:
        raise ProbeError(f"no shifted set to compare with {base!r}: give one or more")
    complete = [m for m, by_set in scores.items() if {base, *shifted} <= by_set.keys()]
    if not complete:
        raise ProbeError(
            f"no model has scores on {base!r} and {', '.join(map(repr, shifted))}: evaluate them"
        )
    lines = baseline_lines(scores, base, shifted, baseline)
    return [
        {
            "model": model,
            "baseline": model in baseline,
            "base": scores[model][base],
            "shifted": {name: scores[model][name] for name in shifted},
            "shifted_mean": average(scores[model], shifted),
            "drop": {name: scores[model][base] - scores[model][name] for name in shifted},
            "effective_robustness": {
                name: scores[model][name] - line(scores[model][base])
                for name, line in lines.items()
            }
            or None,
        }
        for model in complete
    ]


def baseline_lines(
    scores: Scores, base: str, shifted: Sequence[str], baseline: Sequence[str]
) -> dict[str, Line]:
    """For each shifted set the line through the baseline models; none without such models.

    Raises:
        ProbeError: fewer than two, one without some score, or all of one accuracy on the base set.
    """
    if not baseline:
        return {}
    for model in baseline:
        if missing := [name for name in (base, *shifted) if name not in scores.get(model, {})]:
            raise ProbeError(f"baseline model {model!r} has no score on {', '.join(missing)}")
    x = [logit(scores[model][base]) for model in baseline]
    middle = sum(x) / len(x)
    spread = sum((value - middle) ** 2 for value in x)
    if not spread:
        raise ProbeError(
            f"a baseline is a line through two or more models of different accuracy on {base!r}, "
            f"found {len(baseline)}: {', '.join(baseline)}"
        )
    lines: dict[str, Line] = {}
    for name in shifted:
        y = [logit(scores[model][name]) for model in baseline]
        mean = sum(y) / len(y)
        slope = sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / spread
        lines[name] = Line(slope, mean - slope * middle)
    return lines


def logit(share: float) -> float:
    """Log odds; shares beyond [EDGE, 1 - EDGE] are taken as these."""
    share = min(max(share, EDGE), 1 - EDGE)
    return log(share / (1 - share))


def scores_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Top-1 by model and set, of the result lines of `zeroshot`, `eval` and `suite`.

    A suite's names are taken as they are. Else a set goes by its folder's name, and a model by its
    path, with the head that was evaluated.

    Raises:
        ProbeError: two scores of one model on one set.
    """
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("task") not in ("zeroshot", "eval") or "acc1" not in row:
            continue
        head = f" {row['head']}" if "head" in row else ""
        model = row.get("name") or str(row["model"]) + head
        dataset = row.get("set") or Path(row["dataset"]).name
        if dataset in scores.setdefault(model, {}):
            raise ProbeError(f"two scores of {model!r} on {dataset!r}: give one file of one split")
        scores[model][dataset] = row["acc1"]
    return scores


def plot_robustness(
    scores: Scores, base: str, shifted: Sequence[str], baseline: Sequence[str], path: Path
) -> None:
    """Shifted against base accuracy on logit axes: a panel for each shifted set."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows = robustness(scores, base, shifted, baseline)
    lines = baseline_lines(scores, base, shifted, baseline)
    columns = min(3, len(shifted))
    tall = -(-len(shifted) // columns)
    figure = Figure(figsize=(0.8 + 3.9 * columns, 0.9 + 3.6 * tall), layout="compressed")
    panels = figure.subplots(tall, columns, squeeze=False).flatten()
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    values = [v for row in rows for v in (row["base"], *row["shifted"].values())]
    low, high = logit(min(values)) - 0.4, logit(max(values)) + 0.4
    span = [low + (high - low) * step / 50 for step in range(51)]
    for panel in panels[len(shifted) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, shifted, strict=False):
        panel.plot([low, high], [low, high], color="grey", linestyle=":", label="no drop")
        if name in lines:
            line = lines[name]
            usual = [line.slope * x + line.intercept for x in span]
            panel.plot(span, usual, color="tab:red", linewidth=1, label="baseline")
        for number, row in enumerate(rows):
            panel.plot(
                logit(row["base"]),
                logit(row["shifted"][name]),
                linestyle="none",
                marker="s" if row["baseline"] else "o",
                color=f"C{number % 10}",
                label=row["model"] + (" (baseline)" if row["baseline"] else ""),
            )
        shown = [t for t in ticks if low <= logit(t) <= high]
        places = [logit(t) for t in shown]
        panel.set(
            xlim=(low, high), ylim=(low, high), xlabel=f"{base}, top-1", ylabel="top-1", title=name
        )
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_ticks(places)
            axis.set_ticklabels([f"{share:.0%}" for share in shown])
            axis.set_minor_formatter(NullFormatter())
        panel.set_box_aspect(1)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150, format="png")
