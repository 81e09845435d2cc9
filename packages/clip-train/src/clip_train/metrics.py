"""What a run tells of itself: rows of JSON Lines, and the curves drawn from them.

RUN/metrics.jsonl       a row per logged step
RUN/validation.jsonl    a row per validation
RUN/skipped.jsonl       a row per skipped step, with the samples of its batch
RUN/loss.png
"""

import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]

METRICS, VALIDATION, SKIPPED = "metrics.jsonl", "validation.jsonl", "skipped.jsonl"


def read_rows(run: Path, name: str = METRICS) -> list[Row]:
    """The rows so far; a line that a killed process left unfinished is dropped."""
    file = run / name
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(run: Path, step: int) -> None:
    """Forget the rows after `step`, which a resumed run will write again."""
    for name in (METRICS, VALIDATION, SKIPPED):
        if (run / name).exists():
            temporary = run / f".{name}"
            rows = [row for row in read_rows(run, name) if row["step"] <= step]
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            temporary.replace(run / name)


def append(run: Path, row: Row, name: str = METRICS) -> None:
    """Add one row; a number that is not finite becomes null, as JSON has none such."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    with (run / name).open("a") as file:
        file.write(json.dumps(finite) + "\n")


def describe(row: Row) -> str:
    """A row of metrics.jsonl in a few words, for the progress bar."""
    tflops = f", {row['tflops']:.3g} TFLOP/s" if row["tflops"] else ""
    return (
        f"loss {row['loss']:.4f}, scale {row['logit_scale']:.1f}, grad {row['grad_norm']:.2g}, "
        f"{row['samples_per_second_per_device']:g}/s a device, "
        f"waiting {100 * row['data_wait']:.0f}%{tflops}"
    )


class Meter:
    """Times the loop between two rows."""

    def __init__(self, step: int, batch_size: int, devices: int, gmacs: float | None) -> None:
        """What one step is.

        Args:
            step: steps taken before the first that is timed.
            gmacs: 1e9 multiply-accumulates of a pair's forward pass; None: not known.
        """
        self._batch_size = batch_size
        self._devices = devices
        self._gmacs = gmacs
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Count what happens inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave out what happens inside: validation, a save."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def rates(self, step: int) -> Row:
        """The rates since the last call, after `step` steps.

        TFLOP/s are of the model as the paper counts it: 3 forward passes of 2 operations a
        multiply-accumulate on padded captions. The work saved by not padding them counts as done.
        """
        elapsed = time.perf_counter() - self._since
        rate = (step - self._step) * self._batch_size / elapsed
        rates: Row = {
            "samples_per_second": round(rate, 1),
            "samples_per_second_per_device": round(rate / self._devices, 1),
            "tflops": self._gmacs and round(6e-3 * self._gmacs * rate, 3),
            "data_wait": round(self._waited / elapsed, 4),  # share of the time
        }
        self._restart(step)
        return rates


def plot_loss(run: Path) -> None:
    """Draw RUN/loss.png: losses over samples seen, the learning rate behind them.

    With validations, what they measured stands below.
    """
    from matplotlib.figure import Figure

    rows, validations = read_rows(run), read_rows(run, VALIDATION)
    samples = [row["samples"] for row in rows]
    figure = Figure(figsize=(7, 7 if validations else 4), dpi=120, layout="constrained")
    loss, *below = figure.subplots(2 if validations else 1, sharex=True, squeeze=False)[:, 0]
    rate = loss.twinx()
    rate.fill_between(samples, [row["lr"] for row in rows], color="0.92", linewidth=0)
    rate.set_ylabel("learning rate", color="0.6")
    rate.set_ylim(bottom=0)
    loss.set_zorder(rate.get_zorder() + 1)  # the curve above the shade
    loss.patch.set_visible(False)
    curve = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    loss.plot(samples, curve, color="tab:blue", label="training")
    loss.set_ylabel("contrastive loss")
    places = [row["samples"] for row in validations]
    if validations and "val_loss" in validations[0]:
        found = [row["val_loss"] for row in validations]
        loss.plot(places, found, "o-", color="tab:orange", label="held-out")
        loss.legend()
    for name, label in _SHARES.items() if below else ():
        if name in validations[0]:
            below[0].plot(places, [100 * row[name] for row in validations], "o-", label=label)
            below[0].set_ylabel("%")
            below[0].set_ylim(bottom=0)
            below[0].grid(axis="y", color="0.92")
            below[0].legend(loc="lower right")
    (last := (below or [loss])[-1]).set_xlabel("samples seen")
    last.xaxis.set_major_formatter("{x:,.0f}")
    temporary = run / ".loss.png"
    figure.savefig(temporary, format="png")
    temporary.replace(run / "loss.png")


_SHARES = {
    "zeroshot_top1": "zero-shot accuracy",
    "image_to_text_recall@5": "Recall@5, image to text",
    "text_to_image_recall@5": "Recall@5, text to image",
}
