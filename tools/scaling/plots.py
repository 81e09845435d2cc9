"""Log-log pictures of the laws, as in the paper: colour the model, marker the data, size the
samples seen."""

import io
import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from errors import ScalingError
from frontier import SAME
from law import Floats, Law, interval, power
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from points import Point, matches

MARKERS = "osD^vP*Xph"
LINES = ("#222222", "#c0392b", "#2471a3", "#7d6608", "#6c3483")
FAINT = 0.4
AHEAD = 0.6  # decades that a line is drawn beyond the runs
HEADINGS = ("Model", "Data", "Samples seen")
TICKS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10)


def plot(fitted: Sequence[Law], suffix: str, metrics: Sequence[str] = ()) -> bytes:
    """A panel for each quantity, as the bytes of a .png, .svg or .pdf; no dates, fixed ids.

    Raises:
        ScalingError: another suffix, or no such quantity.
    """
    if suffix not in (".png", ".svg", ".pdf"):
        raise ScalingError(f"a picture ends in .png, .svg or .pdf, not {suffix or 'nothing'!r}")
    wanted = [law for law in fitted if matches(law.quantity, metrics)]
    if not wanted:
        known = ", ".join(sorted({law.quantity for law in fitted}))
        raise ScalingError(f"nothing to plot of {', '.join(metrics)}; the fit has {known}")
    panels: dict[str, list[Law]] = {}
    for law in wanted:
        panels.setdefault(law.quantity, []).append(law)
    style = {
        "svg.hashsalt": "scaling",
        "font.size": 9,
        "axes.titlesize": 10,
        "font.family": "DejaVu Sans",
    }
    with mpl.rc_context(style):
        figure = _figure(panels)
        stream = io.BytesIO()
        dates = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}
        figure.savefig(stream, format=suffix[1:], dpi=150, metadata={dates[suffix]: None})
    return stream.getvalue()


def _figure(panels: dict[str, list[Law]]) -> Figure:
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    rows = math.ceil(len(panels) / columns)
    width, height = (6.2, 4.6) if columns == 1 else (4.6, 3.9)
    figure = Figure(figsize=(width * columns + 1.7, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    runs = [p for laws in panels.values() for law in laws for p in law.points]
    look = _Look(runs)
    for ax, (quantity, laws) in zip(axes, panels.items(), strict=False):
        _panel(ax, quantity, laws, look)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    legend = figure.legend(
        handles=look.legend(), loc="outside right upper", frameon=False, handletextpad=0.6
    )
    for text in legend.get_texts():
        if text.get_text() in HEADINGS:
            text.set_fontweight("bold")
    return figure


class _Look:
    """Which colour, marker and size a run has, over the whole picture."""

    def __init__(self, runs: Sequence[Point]) -> None:
        models = {p.model: p.gmacs for p in runs}
        order = sorted(models, key=lambda model: (models[model], model))
        colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.88, max(len(order), 2)))
        self.colours = {m: mpl.colors.to_hex(c) for m, c in zip(order, colours, strict=False)}
        data = list(dict.fromkeys(p.data for p in runs))
        self.markers = {d: MARKERS[i % len(MARKERS)] for i, d in enumerate(data)}
        self.lengths: list[list[float]] = []  # samples seen, those alike together
        for samples in sorted({p.samples_seen for p in runs}):
            if self.lengths and samples <= self.lengths[-1][0] * 10 ** (2 * SAME):
                self.lengths[-1].append(samples)
            else:
                self.lengths.append([samples])

    def size(self, samples: float) -> float:
        """Area of a marker in points squared."""
        step = next(i for i, alike in enumerate(self.lengths) if samples in alike)
        return 22 + 90 * step / max(len(self.lengths) - 1, 1)

    def legend(self) -> list[Line2D]:
        """Models, data and samples seen, under a heading each."""

        def entry(label: str, **how: object) -> Line2D:
            return Line2D([], [], linestyle="none", label=label, **how)  # type: ignore[arg-type]

        rows = [entry("Model")]
        rows += [entry(m, marker="o", color=c, markersize=7) for m, c in self.colours.items()]
        if any(self.markers):
            rows += [entry(""), entry("Data")]
            rows += [
                entry(d or "not said", marker=m, color="#777777", markersize=7)
                for d, m in self.markers.items()
            ]
        rows += [entry(""), entry("Samples seen")]
        for alike in self.lengths:
            size = math.sqrt(self.size(alike[0]))
            label = short(float(np.median(alike)))
            rows.append(entry(label, marker="o", color="#777777", markersize=size))
        return rows


def short(count: float) -> str:
    """2.56e9 as 2.6B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return (
                f"{count / unit:.2g}{name}" if count < 100 * unit else f"{count / unit:.0f}{name}"
            )
    return f"{count:g}"


def _panel(ax: Axes, quantity: str, laws: Sequence[Law], look: _Look) -> None:
    is_error = laws[0].points[0].kind == "error"
    scale = 100 if is_error else 1
    ax.set(xscale="log", yscale="log", title=quantity)
    ax.set_xlabel("compute of the training, GMAC")
    ax.set_ylabel("error, %" if is_error else "loss")
    for colour, law in zip(LINES * len(laws), laws, strict=False):
        _runs(ax, law, look, scale)
        if law.line is not None:
            _line(ax, law, colour, scale)
    shown = [scale * p.error for law in laws for p in law.points]
    low, high = min(shown) / 1.12, max(shown) * 1.08
    bottom, top = ax.get_ylim()
    highest = min(high * 1.15, 105) if is_error else high * 1.15  # an error ends at 100%
    ax.set_ylim(max(bottom, low / 1.25), min(top, highest))
    _ticks(ax)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left", fontsize=8, framealpha=0.85, edgecolor="none")


def _runs(ax: Axes, law: Law, look: _Look, scale: float) -> None:
    carrying = set(law.chosen[2])
    for index, p in enumerate(law.points):
        ax.scatter(
            p.compute,
            scale * p.error,
            s=look.size(p.samples_seen),
            c=look.colours[p.model],
            marker=look.markers[p.data],
            alpha=1.0 if index in carrying else FAINT,
            edgecolors="white" if index in carrying else "none",
            linewidths=0.6,
            zorder=3 if index in carrying else 2,
        )


def _line(ax: Axes, law: Law, colour: str, scale: float) -> None:
    low, high = float(law.log_compute.min()), float(law.log_compute.max())
    assert law.line is not None
    height, slope = law.line
    x = np.linspace(low, high + AHEAD, 60)
    y = scale * 10 ** (height + slope * x)
    inside = x <= high
    name = "" if law.group == "all" else f"{law.group}: "
    label = rf"{name}$E = {_number(power(height))}\,C^{{{slope:.3f}}}$"
    end = int(inside.sum())
    ax.plot(10 ** x[:end], y[:end], color=colour, linewidth=1.6, label=label, zorder=2.5)
    ax.plot(10 ** x[end - 1 :], y[end - 1 :], color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    if law.replicates is not None:
        band = _band(law, x)
        ax.fill_between(10**x, scale * band[0], scale * band[1], color=colour, alpha=0.12, lw=0)


def _band(law: Law, x: Floats) -> tuple[Floats, Floats]:
    assert law.replicates is not None
    heights, slopes = law.replicates
    ends = [interval(heights + slopes * at, len(law.points)) for at in x]
    low, high = np.array(ends).T
    return 10**low, 10**high


def _number(value: float) -> str:
    """A prefactor in at most four characters or as a power of ten, for mathtext."""
    if 0.01 <= value < 10000:
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    power = math.floor(math.log10(value))
    return rf"{value / 10**power:.2g}\times10^{{{power}}}"


def _ticks(ax: Axes) -> None:
    """Plain figures on the error axis, which seldom spans a decade; powers of ten below."""
    low, high = ax.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = sorted({t * 10.0**p for p in powers for t in TICKS})
    inside = [place for place in places if low <= place <= high]
    if len(inside) < 4:  # a short axis: every half
        places = [t / 2 * 10.0**p for p in powers for t in range(2, 20)]
        inside = [place for place in places if low <= place <= high]
    if len(inside) > 9:  # more than a decade: powers of ten, and halves between them
        inside = [t * 10.0**p for p in powers for t in (1, 2, 5) if low <= t * 10.0**p <= high]
    ax.yaxis.set_major_locator(FixedLocator(inside))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
