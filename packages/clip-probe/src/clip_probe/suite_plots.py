"""Pictures of a suite: zero-shot accuracy by set, probes by number of shots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Row = Mapping[str, Any]


def plot_zeroshot(models: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Top-1 of each model on each set with its interval, and the share of the commonest class."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    step = 0.7 / max(1, len(models))
    height = 1.6 + len(sets) * max(0.3, 0.16 * len(models))
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(models):
        mine = [row for row in rows if row["name"] == model]
        values = [row["acc1"] for row in mine]
        offset = (number - (len(models) - 1) / 2) * step
        axes.errorbar(
            values,
            [sets.index(row["set"]) + offset for row in mine],
            xerr=[
                [v - row["acc1_ci95"][0] for v, row in zip(values, mine, strict=True)],
                [row["acc1_ci95"][1] - v for v, row in zip(values, mine, strict=True)],
            ],
            linestyle="none",
            marker="o",
            markersize=4,
            capsize=2,
            color=f"C{number % 10}",
            label=model,
        )
    chance = {row["set"]: row["majority_class_share"] for row in rows}
    axes.scatter(
        [chance[name] for name in sets],
        range(len(sets)),
        marker="|",
        s=160,
        color="grey",
        label="commonest class",
    )
    axes.set_yticks(range(len(sets)), sets)
    axes.set(xlabel="zero-shot top-1", xlim=(0, 1), ylim=(len(sets) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150, format="png")


def plot_few_shot(
    models: Sequence[str],
    rows: Sequence[Row],
    zeroshot: Mapping[tuple[str, str], float],
    path: Path,
) -> None:
    """A panel for each set: accuracy against shots for each model, then all images."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    columns = min(3, len(sets))
    tall = -(-len(sets) // columns)
    figure = Figure(figsize=(1.2 + 4.0 * columns, 0.9 + 3.3 * tall), layout="constrained")
    panels = figure.subplots(tall, columns, squeeze=False).flatten()
    for panel in panels[len(sets) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, sets, strict=False):
        here = [row for row in rows if row["set"] == name]
        shots = sorted({few["shots"] for row in here for few in row["few_shot"]})
        for row in here:
            colour = f"C{models.index(row['name']) % 10}"
            few_shot = row["few_shot"]
            places = [shots.index(few["shots"]) for few in few_shot]
            panel.errorbar(
                [*places, len(shots)],
                [*(few["acc1_mean"] for few in few_shot), row["full"]["acc1"]],
                yerr=[*(few["acc1_std"] or 0.0 for few in few_shot), 0.0],
                marker="o",
                markersize=4,
                capsize=3,
                color=colour,
                label=row["name"],
            )
            if (row["name"], name) in zeroshot:
                panel.axhline(
                    zeroshot[row["name"], name], color=colour, linestyle="--", linewidth=1
                )
        panel.set_xticks(range(len(shots) + 1), [*map(str, shots), "all"])
        panel.set(xlabel="training images per class", ylabel="test accuracy", title=name)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150, format="png")
