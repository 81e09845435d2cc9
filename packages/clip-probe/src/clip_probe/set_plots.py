"""Pictures about one head on one set: reliability and confusions."""

# C classes

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from clip_probe.calibration import Calibration

MOST_NAMES = 60  # more class names cannot be read along an axis


def plot_reliability(calibration: Calibration, title: str, path: Path) -> None:
    """Accuracy of each bin of confidence, and how many samples it holds."""
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 1 / len(calibration.samples_B)
    edges = [number * width for number in range(len(calibration.samples_B))]
    filled = [n for n, samples in enumerate(calibration.samples_B) if samples]
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
    axes.bar(
        [edges[n] for n in filled],
        [calibration.accuracy_B[n] for n in filled],
        width=width,
        align="edge",
        color="tab:blue",
        edgecolor="white",
        label="accuracy",
    )
    axes.plot(
        [calibration.confidence_B[n] for n in filled],
        [calibration.accuracy_B[n] for n in filled],
        marker="o",
        markersize=4,
        color="tab:orange",
        label="at the bin's mean confidence",
    )
    axes.set(ylabel="accuracy", title=f"{title}: ECE {calibration.ece:.1%}", ylim=(0, 1))
    axes.legend(fontsize="small", loc="upper left")
    counts.bar(edges, calibration.samples_B, width=width, align="edge", edgecolor="white")
    counts.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    for part in (axes, counts):
        part.grid(alpha=0.3)
        part.set_axisbelow(True)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    counts.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.savefig(path, dpi=150, format="png")


def plot_confusion(
    confusion_CC: Tensor, class_names: Sequence[str], title: str, path: Path
) -> None:
    """Shares of each class (row) that were called each class (column)."""
    classes = len(class_names)
    named = classes <= MOST_NAMES
    side = min(14.0, max(4.5, 2.2 + 0.32 * classes)) if named else 9.0
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares_CC = (confusion_CC / confusion_CC.sum(1, keepdim=True).clamp_min(1)).numpy()
    picture = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if named:
        labels = [_short(name) for name in class_names]
        axes.set_xticks(range(classes), labels, rotation=90, fontsize="small")
        axes.set_yticks(range(classes), labels, fontsize="small")
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                if count := int(confusion_CC[row, column]):
                    dark = shares_CC[row, column] > 0.5
                    colour = "white" if dark else "black"
                    axes.text(
                        column, row, str(count), color=colour, ha="center", va="center", fontsize=7
                    )
    axes.set(xlabel="named", ylabel="class", title=title)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.savefig(path, dpi=150, format="png")


def _short(name: str) -> str:
    return "(empty)" if not name else name if len(name) <= 24 else name[:23] + "…"
