"""How a call of `train` ended, from what the run directory holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clip_train import metrics
from clip_train.state import Position, newest_state, read_position

Status = Literal["finished", "stopped", "nothing left to do"]


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended."""

    status: Status
    output: str  # the run directory
    model: str | None  # the model directory; None if the run is not finished
    step: int
    steps: int  # of the whole run
    samples: int  # samples seen
    loss: float | None  # of the last logged step
    unreadable: int  # samples replaced
    skipped: int  # steps that left the weights as they were
    order_hash: str  # of all samples seen, in order
    validation: dict[str, Any]  # the last; empty where there is none


def summarize(status: Status, run: Path, steps: int | None = None) -> Summary:
    """The summary of a run whose newest train state was just written.

    Args:
        steps: of the whole run; None where it is finished.
    """
    state = newest_state(run)
    position = read_position(state) if state else Position()
    rows = metrics.read_rows(run)
    validations = metrics.read_rows(run, metrics.VALIDATION)
    return Summary(
        status=status,
        output=str(run),
        model=None if status == "stopped" else str(run / "model"),
        step=position.step,
        steps=position.step if steps is None else steps,
        samples=position.samples,
        loss=rows[-1]["loss"] if rows else None,
        unreadable=position.unreadable,
        skipped=position.skipped,
        order_hash=position.order_hash,
        validation=validations[-1] if validations else {},
    )
