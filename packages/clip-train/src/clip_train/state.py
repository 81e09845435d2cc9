"""The run directory: whose run it is, and the train state it continues from.

    RUN/run.json                    what decides the result: settings, model and data by content
    RUN/state/step-00000500/        tensors.pt (model, optimizer), state.json (where in the stream)
    RUN/metrics.jsonl               metrics.py
    RUN/loss.png, RUN/model/        written at the end; the model directory last

Nothing else needs saving: the order of samples, the crops, the learning rate and each step's
random numbers are functions of the seed and the step.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from clip_models import CLIP

from clip_train.config import NEUTRAL, TrainConfig
from clip_train.errors import TrainError

KEPT = 2  # train states


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0  # steps taken
    order_hash: str = ""  # of all samples in the batches so far (order.extend_hash)
    unreadable: int = 0  # samples replaced so far


def identity(config: TrainConfig, *, bf16: bool, model: Any, data: str) -> dict[str, Any]:
    """What must not change between the parts of a run, as JSON values.

    Args:
        bf16: what --precision came to on this device.
        model: the initial model's content: its model_cfg, or its weights' fingerprint.
        data: `shards.data_hash`.
    """
    settings = {name: v for name, v in config.arguments.items() if name not in NEUTRAL}
    return settings | {"precision": "bf16" if bf16 else "fp32", "model": model, "train_data": data}


def check_run(run: Path, wanted: dict[str, Any]) -> bool:
    """Whether RUN/model is finished; writes nothing.

    Raises:
        TrainError: the directory holds another run, or something else.
    """
    record = run / "run.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())["identity"]
        begun = (run / "model").exists() or newest_state(run) is not None
        changed = [name for name in wanted if wanted[name] != found.get(name)]
        if begun and changed:
            differences = "; ".join(
                f"--{name.replace('_', '-')} was {_short(found.get(name))}, "
                f"is {_short(wanted[name])}"
                for name in changed
            )
            raise TrainError(
                f"{run} holds a run with other settings: {differences}; "
                "repeat its settings or choose another --output"
            )
    elif run.exists() and not all(path.name.startswith(".") for path in run.iterdir()):
        raise TrainError(f"{run} exists and is not a clip-train run; choose another --output")
    return (run / "model").exists()


def claim_run(run: Path, wanted: dict[str, Any]) -> None:
    """Write run.json, and clear away what an interrupted write left."""
    run.mkdir(parents=True, exist_ok=True)
    for leftover in (*run.glob(".model.*"), *(run / "state").glob(".step-*")):
        shutil.rmtree(leftover)
    temporary = run / ".run.json"
    temporary.write_text(json.dumps({"format": 1, "identity": wanted}, indent=2) + "\n")
    temporary.replace(run / "run.json")
    (run / "state").mkdir(exist_ok=True)


def newest_state(run: Path) -> Path | None:
    """The train state to continue from; None where there is none."""
    return max((run / "state").glob("step-*"), default=None, key=lambda path: path.name)


def save_state(
    run: Path, position: Position, model: CLIP, optimizer: torch.optim.Optimizer
) -> None:
    """Write a train state whole or not at all, and drop all but the last two."""
    target = run / "state" / f"step-{position.step:08}"
    if target.exists():  # stopped just after a save
        return
    temporary = target.with_name(f".{target.name}")
    temporary.mkdir()
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with (temporary / "tensors.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())  # the name must not outlive the bytes if the machine goes down
    with (temporary / "state.json").open("w") as file:
        json.dump({"format": 1, **asdict(position)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(target)
    for old in sorted((run / "state").glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_state(path: Path, model: CLIP, optimizer: torch.optim.Optimizer) -> Position:
    """Put a train state into `model` and `optimizer`."""
    values: dict[str, Any] = json.loads((path / "state.json").read_text())
    if values.pop("format") != 1:
        raise TrainError(f"{path}: written by another version of clip-train; start the run again")
    tensors = torch.load(path / "tensors.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(tensors["model"])
    optimizer.load_state_dict(tensors["optimizer"])
    return Position(**values)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
