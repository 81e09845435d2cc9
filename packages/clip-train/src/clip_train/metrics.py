"""RUN/metrics.jsonl, a row per logged step, and the loss curve drawn from it."""

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(run: Path) -> list[Row]:
    """The rows so far; a line that a killed process left unfinished is dropped."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(run: Path, step: int) -> None:
    """Forget the rows after `step`, which a resumed run will write again."""
    temporary = run / ".metrics.jsonl"
    rows = [row for row in read_rows(run) if row["step"] <= step]
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(run / "metrics.jsonl")


def append(run: Path, row: Row) -> None:
    """Add one row."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class Meter:
    """Times the loop between two rows."""

    def __init__(self, step: int, batch_size: int) -> None:
        """Args: step: steps taken before the first that is timed."""
        self._batch_size = batch_size
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Count what happens inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def rates(self, step: int) -> Row:
        """The rates since the last call, after `step` steps."""
        elapsed = time.perf_counter() - self._since
        rates: Row = {
            "samples_per_second": round((step - self._step) * self._batch_size / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),  # share of the time
        }
        self._restart(step)
        return rates


def plot_loss(run: Path) -> None:
    """Draw RUN/loss.png: loss over samples seen, the learning rate behind it."""
    from matplotlib.figure import Figure

    rows = read_rows(run)
    samples = [row["samples"] for row in rows]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    loss = figure.add_subplot()
    rate = loss.twinx()
    rate.fill_between(samples, [row["lr"] for row in rows], color="0.92", linewidth=0)
    rate.set_ylabel("learning rate", color="0.6")
    rate.set_ylim(bottom=0)
    loss.set_zorder(rate.get_zorder() + 1)  # the curve above the shade
    loss.patch.set_visible(False)
    loss.plot(samples, [row["loss"] for row in rows], color="tab:blue")
    loss.set_xlabel("samples seen")
    loss.set_ylabel("contrastive loss")
    temporary = run / ".loss.png"
    figure.savefig(temporary, format="png")
    temporary.replace(run / "loss.png")
