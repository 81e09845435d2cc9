"""The train state of an unfinished run: OUT.state/ beside the model directory it will become.

    OUT.state/state.pt        step, what learns, its running mean, optimizer; replaced as a whole
    OUT.state/metrics.jsonl   a line a step
    OUT.state/model/          the finished model while it is being written; then renamed to OUT

It is private to `clip-finetune train`, and gone when OUT is there. The order of samples, the crops,
the rate and each step's random numbers are functions of seed and step: nothing else needs saving.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from clip_finetune.identity import refuse_other


class TrainState:
    """Reads and writes OUT.state/. `run` says which run it is; another's state is refused."""

    def __init__(self, out: Path, run: dict[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".state")
        self.run = run
        self.metrics = self.folder / "metrics.jsonl"
        self._file = self.folder / "state.pt"

    def load(self) -> dict[str, Any] | None:
        """What `save` was last given, or None where nothing was saved.

        Raises:
            FinetuneError: the state is of a run with other arguments, tasks or model.
        """
        if not self._file.is_file():
            return None
        state: dict[str, Any] = torch.load(self._file, map_location="cpu", weights_only=True)
        refuse_other(self.folder, state["run"], self.run)
        return state

    def save(self, **state: Any) -> None:
        """Write the state whole or not at all, also if the machine goes down."""
        temporary = self._file.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save({"run": self.run, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._file)

    def begin(self, steps: int) -> None:
        """Make the folder, and drop the metrics of all but the first `steps`: they come again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.is_file() else []
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(lines[:steps]))
        os.replace(temporary, self.metrics)

    def log(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        """Nothing is left to continue."""
        shutil.rmtree(self.folder, ignore_errors=True)
