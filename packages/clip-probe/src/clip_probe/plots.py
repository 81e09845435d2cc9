"""Pictures of a sweep: accuracy versus shots, accuracy of every setting."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clip_probe.sweep_table import judged_rows, label


def plot_shots(result: dict[str, Any], path: Path) -> None:
    """Draw a sweep's result: few-shot means with their spread, full data, zero-shot, chance."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    few_shot, full = result["few_shot"], result["full"]
    places = range(len(few_shot) + 1)  # even steps: shots double, usually
    if few_shot:
        axes.errorbar(
            places[:-1],
            [row["acc1_mean"] for row in few_shot],
            yerr=[row["acc1_std"] or 0.0 for row in few_shot],
            marker="o",
            capsize=4,
            label=f"linear probe, mean ± std of {result['seeds']} draws",
        )
    low, high = full["acc1_ci95"]
    axes.errorbar(
        places[-1:],
        [full["acc1"]],
        yerr=[[full["acc1"] - low], [high - full["acc1"]]],
        marker="s",
        capsize=4,
        linestyle="none",
        label=f"linear probe, all {full['train_samples']:,} images (95% interval)",
    )
    if result["zero_shot"]:
        acc1 = result["zero_shot"]["acc1"]
        axes.axhline(acc1, color="tab:green", linestyle="--", label=f"zero-shot {acc1:.1%}")
    chance = result["majority_class_share"]
    axes.axhline(chance, color="grey", linestyle=":", label=f"most frequent class {chance:.1%}")
    axes.set_xticks(places, [*(str(row["shots"]) for row in few_shot), "all"])
    axes.set(
        xlabel="training images per class",
        ylabel="test accuracy",
        title=f"{Path(result['dataset']).name}, {result['feature']} features"
        + (", best settings chosen on test" if "test_acc1" in full else ""),
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")


def plot_grid(result: dict[str, Any], path: Path) -> None:
    """A heat map: a row for each number of shots, a column for each setting; the best is bold."""
    rows = judged_rows(result)
    names, accuracy = [label(setting) for setting in result["grid"]], np.array([*rows.values()])
    figure = Figure(figsize=(2 + 0.42 * len(names), 2.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    # each row on its own scale: the shots differ more than the settings
    low, high = accuracy.min(1, keepdims=True), accuracy.max(1, keepdims=True)
    axes.imshow((accuracy - low) / np.maximum(high - low, 1e-9), aspect="auto", cmap="viridis")
    for y, line in enumerate(accuracy):
        for x, value in enumerate(line):
            best = x == line.argmax()
            axes.text(
                x,
                y,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize="x-small",
                weight="bold" if best else "normal",
                color="white" if value < (low[y, 0] + high[y, 0]) / 2 else "black",
            )
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="small")
    axes.set_yticks(range(len(rows)), [*rows])
    judge = "test" if "test_acc1" in result["full"] else "validation"
    axes.set(
        ylabel="images per class",
        title=f"{judge} accuracy in %, {Path(result['dataset']).name}; colours within a row",
    )
    figure.savefig(path, dpi=150, format="png")
