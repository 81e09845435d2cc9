"""A task: a labelled set and the head its features are trained against."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clip_models import Head, LoadedModel, build_head, load_head

from clip_finetune.classes import fit_head, head_hash, require_post
from clip_finetune.config import TrainConfig
from clip_finetune.errors import FinetuneError
from clip_finetune.labelled_set import LabelledSet, open_set


@dataclass(frozen=True)
class Task:
    """A labelled set, and the saved head to start from, if any: its name and its rows.

    Without one, the set's zero-shot head.
    """

    data: LabelledSet
    head_name: str | None = None
    saved_head: Head | None = None

    @property
    def name(self) -> str:
        return self.data.name

    def describe(self) -> dict[str, Any]:
        """What the task holds, for provenance; equal descriptions train the same.

        `interpolate` and `curve` find the head that training started from by it.
        """
        head, data = self.saved_head, self.data
        description = {
            "name": self.name,
            "split": data.split,
            "samples": len(data),
            "classes": len(data.class_names),
            "data": data.fingerprint(),
            "head": "zero-shot" if head is None else f"{head.kind} {head_hash(head)}",
        }
        if head is None:
            return description | {"templates": list(data.templates)}
        return description | {"head_name": self.head_name}

    def initial_head(self, loaded: LoadedModel, device: torch.device) -> Head:
        """The head on `device`; a zero-shot head is built with `loaded`'s text tower."""
        head = self.saved_head
        if head is None:
            names, templates = self.data.class_names, self.data.templates
            head = build_head(loaded, names, templates, allow_duplicates=True)
        return replace(head, weight=head.weight.to(device), bias=head.bias.to(device))


def open_tasks(model: Path, config: TrainConfig) -> list[Task]:
    """Open every task of a run.

    Raises:
        FinetuneError: two tasks of one name, or a name that no head can have; a head that does not
            fit its set, a set without data.
        ModelError: a head of another model, or none of that name.
    """
    sets = [open_set(path, config.train_split) for path in config.task]
    refuse_same_names(sets)
    for data in sets:
        if not data.name or data.name.startswith("."):
            raise FinetuneError(
                f"{data.path}: the folder's name becomes the name of a head, and {data.name!r} "
                "cannot; rename the folder"
            )
    if not config.head:
        return [Task(data) for data in sets]
    tasks: list[Task] = []
    for data, name in zip(sets, config.head, strict=True):
        head = load_head(model, name)
        require_post(name, head)
        fitted = fit_head(head, data.class_names, f"head {name!r} for {data.path}")
        tasks.append(Task(data, name, fitted))
    return tasks


def refuse_same_names(sets: list[LabelledSet]) -> None:
    """Raises FinetuneError where two sets have one name: it names heads and columns of tables."""
    seen: dict[str, LabelledSet] = {}
    for data in sets:
        if data.name in seen:
            raise FinetuneError(
                f"{data.path} and {seen[data.name].path} are both named {data.name!r}; "
                "give each set once, in folders of different names"
            )
        seen[data.name] = data
