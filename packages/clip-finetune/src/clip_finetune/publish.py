"""The end of a run: OUT, a model directory with its heads and the run's metrics."""

import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from clip_models import Head, LoadedModel, build_head, fingerprint_of, save_head, save_model
from torch import Tensor

from clip_finetune.learner import tower_state
from clip_finetune.state import TrainState
from clip_finetune.tasks import Task


def publish(
    out: Path,
    loaded: LoadedModel,
    heads: dict[Task, Head],
    learned: dict[str, Tensor],
    state: TrainState,
    summary: dict[str, int],
) -> None:
    """Write model, heads and metrics, and rename the directory to `out` as a whole.

    A frozen zero-shot head stays one: the text tower that made it is unchanged, and would make the
    same head for the new model. FLYP's text tower makes new ones. Any other head is now half of a
    fitted pair: "fine-tuned".

    Args:
        loaded: the model that was trained; everything that did not learn is its own.
        heads: of the tasks in order, as training began with them.
        learned: the state of a `Learner`.
    """
    folder = state.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed right here
    provenance = {
        "tool": f"clip-finetune {version('clip-finetune')}",
        "command": "train",
        **state.run,
        **summary,
        "base_provenance": loaded.provenance,
    }
    weights = loaded.model.state_dict() | tower_state(learned)
    loaded.model.load_state_dict(weights)  # the running mean, where there is one
    loaded.model.eval()
    save_model(folder, loaded.model, loaded.preprocess, provenance, loaded.tokenizer)
    fingerprint = fingerprint_of(folder)
    flyp = state.run["arguments"]["method"] == "flyp"
    for number, (task, start) in enumerate(heads.items()):
        weight, bias = learned[f"head.weight_{number}"].cpu(), learned[f"head.bias_{number}"].cpu()
        head = replace(start, weight=weight, bias=bias)
        if flyp:
            names, templates = task.data.class_names, task.data.templates
            head = build_head(loaded, names, templates, allow_duplicates=True)
        elif head.kind != "zero-shot" or not torch.equal(weight, start.weight.cpu()):
            head = replace(head, kind="fine-tuned", templates_hash=None)
        save_head(folder, task.name, replace(head, fingerprint=fingerprint))
    (folder / "training").mkdir()
    shutil.copyfile(state.metrics, folder / "training" / "metrics.jsonl")
    os.rename(folder, out)
    state.remove()
