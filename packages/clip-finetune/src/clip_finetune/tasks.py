"""A task: a labelled set and the frozen head its features are trained against."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clip_models import Head, LoadedModel, build_head, load_head

from clip_finetune.config import TrainConfig
from clip_finetune.errors import FinetuneError
from clip_finetune.labelled_set import LabelledSet, open_set


@dataclass(frozen=True)
class Task:
    """A labelled set, and the saved head to train against (None: the set's zero-shot head)."""

    data: LabelledSet
    saved_head: Head | None

    @property
    def name(self) -> str:
        return self.data.name

    def describe(self) -> dict[str, Any]:
        """What the task holds, for provenance; equal descriptions train the same."""
        head = self.saved_head
        return {
            "name": self.name,
            "split": self.data.split,
            "samples": len(self.data),
            "classes": len(self.data.class_names),
            "data": self.data.fingerprint(),
            "head": "zero-shot" if head is None else f"{head.kind} {_hash(head)}",
        }

    def frozen_head(self, loaded: LoadedModel, device: torch.device) -> Head:
        """The head on `device`; a zero-shot head is built with `loaded`'s text tower."""
        head = self.saved_head
        if head is None:
            names, templates = self.data.class_names, self.data.templates
            head = build_head(loaded, names, templates, allow_duplicates=True)
        return replace(head, weight=head.weight.to(device), bias=head.bias.to(device))


def open_tasks(model: Path, config: TrainConfig) -> list[Task]:
    """Open every task of a run.

    Raises:
        FinetuneError: two tasks of one name, a head that does not fit its set, a set without data.
        ModelError: a head of another model, or none of that name.
    """
    sets = [open_set(path, config.train_split) for path in config.task]
    refuse_same_names(sets)
    heads = [load_head(model, name) for name in config.head] or [None] * len(sets)
    for data, head, name in zip(sets, heads, config.head, strict=False):
        if head is not None:
            _check_fits(name, head, data)
    return [Task(data, head) for data, head in zip(sets, heads, strict=True)]


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


def _hash(head: Head) -> str:
    digest = hashlib.sha256(head.weight.numpy().tobytes() + head.bias.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _check_fits(name: str, head: Head, data: LabelledSet) -> None:
    if head.feature != "post":
        raise FinetuneError(
            f"head {name!r} reads features before the projection; expected a head on the "
            "projected features (clip-probe saves one with --feature post)"
        )
    if head.class_names == data.class_names:
        return
    if len(head.class_names) != len(data.class_names):
        raise FinetuneError(
            f"head {name!r} has {len(head.class_names)} classes, {data.path} has "
            f"{len(data.class_names)}; expected the same classes in the same order"
        )
    pairs = enumerate(zip(head.class_names, data.class_names, strict=True))
    row, (of_head, of_data) = next((row, pair) for row, pair in pairs if pair[0] != pair[1])
    raise FinetuneError(
        f"head {name!r} calls class {row} {of_head!r}, {data.path} calls it {of_data!r}; "
        "expected the same classes in the same order"
    )
