"""The run directory: whose run it is, and the train state it continues from.

    RUN/run.json                    what decides the result: settings, model and data by content
    RUN/state/step-00000500/        a train state:
        model/, model-ema/              model directories
        train.pt                        optimizer, guard
        state.json                      where in the stream
    RUN/metrics.jsonl               metrics.py
    RUN/.lock                       held by the process that writes
    RUN/loss.png, RUN/model/        written at the end; the model directory last

Nothing else needs saving: the order of samples, the crops, the learning rate and each step's
random numbers are functions of the seed and the step. A state is whole, whatever the processes: it
continues on any number of them, sharded or not.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from clip_train.config import FIXED, NEUTRAL, TrainConfig
from clip_train.errors import TrainError

KEPT = 2  # newest train states
_FORMAT = 2


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0  # steps taken
    samples: int = 0  # pairs seen
    order_hash: str = ""  # of all samples in the batches so far (order.extend_hash)
    unreadable: int = 0  # samples replaced so far
    skipped: int = 0  # steps that left the weights as they were
    skipped_in_a_row: int = 0  # of these, the last ones


def identity(config: TrainConfig, *, precision: str, model: Any, data: str) -> dict[str, Any]:
    """What must not change between the parts of a run, as JSON values.

    Args:
        precision: what --precision came to on this device.
        model: the initial model's content: its model_cfg, or its weights' fingerprint.
        data: `shards.data_hash`.
    """
    settings = {name: v for name, v in config.arguments.items() if name not in NEUTRAL}
    return settings | {"precision": precision, "model": model, "train_data": data}


def check_run(run: Path, wanted: dict[str, Any], *, rebase: bool) -> bool:
    """Whether there is nothing left to do; writes nothing.

    Args:
        rebase: go on under changed settings, also where the run was finished.

    Raises:
        TrainError: the directory holds another run, or something else.
    """
    record = run / "run.json"
    if not record.exists():
        if run.exists() and not all(path.name.startswith(".") for path in run.iterdir()):
            raise TrainError(f"{run} exists and is not a clip-train run; choose another --output")
        return False
    found: dict[str, Any] = json.loads(record.read_text())["identity"]
    finished = (run / "model").exists()
    begun = finished or newest_state(run) is not None
    changed = [name for name in wanted if wanted[name] != found.get(name)]
    refused = [name for name in changed if name in FIXED] if rebase else changed
    if begun and refused:
        differences = "; ".join(
            f"--{name.replace('_', '-')} was {_short(found.get(name))}, is {_short(wanted[name])}"
            for name in refused
        )
        fix = "" if rebase else "continue it under the new ones (--rebase), "
        raise TrainError(
            f"{run} holds a run with other settings: {differences}; "
            f"repeat its settings, {fix}or choose another --output"
        )
    return finished and not changed


def lock_run(run: Path) -> IO[str]:
    """Take the run directory for this process, until the file is closed.

    By a POSIX lock, not flock: loader processes, which may outlive a killed run by some seconds,
    would hold that too.

    Raises:
        TrainError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise TrainError(
            f"{run}: another process is training it; choose another --output"
        ) from error
    except OSError:  # a file system without locks
        pass
    return file


def claim_run(run: Path, wanted: dict[str, Any], step: int) -> None:
    """Write run.json, and clear away what an interrupted write left.

    A finished run that is rebased loses RUN/model; its last train state holds the same model.

    Args:
        step: from which on `wanted` holds.
    """
    for leftover in (*run.glob(".model*"), *(run / "state").glob(".step-*")):
        shutil.rmtree(leftover)
    for name in ("model", "model-ema"):
        shutil.rmtree(run / name, ignore_errors=True)
    record = run / "run.json"
    before: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    history: list[dict[str, Any]] = before.get("rebased", [])
    if step and before["identity"] != wanted:
        old = {n: v for n, v in before["identity"].items() if wanted.get(n) != v}
        history = [*history, {"after_step": step, "was": old}]
    temporary = run / ".run.json"
    values = {"format": 1, "identity": wanted, "rebased": history}
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(record)
    (run / "state").mkdir(exist_ok=True)


def newest_state(run: Path) -> Path | None:
    """The train state to continue from; None where there is none."""
    return max((run / "state").glob("step-*"), default=None, key=lambda path: path.name)


def save_state(
    run: Path,
    position: Position,
    tensors: dict[str, Any],
    write_models: Callable[[Path], None],
    keep_every: int,
) -> None:
    """Write a train state whole or not at all, and drop old ones.

    Args:
        tensors: what train.pt holds: whole tensors by name, nested.
        write_models: writes the model directories into the folder it is given.
        keep_every: states of every so many steps stay; 0: only the newest do.
    """
    target = run / "state" / f"step-{position.step:08}"
    if target.exists():  # stopped just after a save
        return
    temporary = target.with_name(f".{target.name}")
    temporary.mkdir()
    write_models(temporary)
    with (temporary / "train.pt").open("wb") as file:
        torch.save(tensors, file)
    (temporary / "state.json").write_text(
        json.dumps({"format": _FORMAT, **asdict(position)}, indent=2)
    )
    for path in temporary.rglob("*"):  # the name must not outlive the bytes if the machine does not
        _sync(path)
    temporary.rename(target)
    for old in sorted((run / "state").glob("step-*"))[:-KEPT]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_position(path: Path) -> Position:
    """Where a train state stands.

    Raises:
        TrainError: another version wrote it.
    """
    values: dict[str, Any] = json.loads((path / "state.json").read_text())
    if values.pop("format") != _FORMAT:
        raise TrainError(f"{path}: written by another version of clip-train; start the run again")
    return Position(**values)


def read_tensors(path: Path) -> dict[str, Any]:
    """A train state's tensors, which stay on the disk until they are used."""
    return torch.load(path / "train.pt", map_location="cpu", weights_only=True, mmap=True)


def publish_models(run: Path) -> None:
    """Make the model directories of the newest train state the run's; RUN/model is the last.

    The files are links to the state's where the file system has such.
    """
    state = newest_state(run)
    assert state is not None
    for name in ("model-ema", "model"):
        if (state / name).exists():
            temporary = run / f".{name}"
            shutil.copytree(state / name, temporary, copy_function=_link)
            temporary.rename(run / name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
