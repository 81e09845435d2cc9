"""The sweep of a labelled set: encode once, probe at every number of shots, test, write down."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from clip_models import Head, LoadedModel, build_head, list_heads, read_templates, save_head
from torch import Tensor

from clip_probe.datasets import Split, open_split
from clip_probe.errors import ProbeError
from clip_probe.extract import Feature
from clip_probe.features import EncodeOptions, encode
from clip_probe.metrics import Scores, best_classes, score
from clip_probe.plots import plot_shots
from clip_probe.probes import GRID, ONE_SHOT_C, Probe, Rows, few_shot_probe, full_probe

CHOICE_BY_VAL = "accuracy on the val split; the full probe is refitted on train and val"
CHOICE_WITHOUT_VAL = (
    "full: accuracy on a stratified fifth of train, then refitted on all of train; "
    f"few-shot: cross-validation within the draw, C = {ONE_SHOT_C:g} for one shot"
)

logger = logging.getLogger(__name__)


def sweep(
    model: LoadedModel,
    dataset: Path,
    *,
    train_split: str = "train",
    val_split: str | None = None,
    test_split: str = "test",
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    feature: Feature = "post",
    seeds: int = 3,
    head_name: str | None = None,
    output: Path | None = None,
    **options: Unpack[EncodeOptions],
) -> dict[str, Any]:
    """Fit and test linear probes; return the results, and write them to `output` if given.

    `output` receives sweep.json and shots.png; where it holds this very sweep already, that is
    returned. `head_name` saves the full-data probe in the model directory.

    Raises:
        ProbeError: a class has fewer images than shots, the head cannot be saved, `output` holds
            another sweep; as `open_split`, `encode` and `full_probe`.
    """
    names = {"train": train_split, "val": val_split, "test": test_split}
    splits = {role: open_split(dataset, name) for role, name in names.items() if name}
    train, test, classes = splits["train"], splits["test"], len(splits["train"].class_names)
    _check_shots(train, torch.tensor(train.labels), shots)
    settings: dict[str, Any] = {
        "fingerprint": model.fingerprint,
        "preprocess": model.preprocess.hash,
        "splits": names,
        "digests": {role: split.digest for role, split in splits.items()},
        "feature": feature,
        "shots": list(shots),
        "seeds": seeds,
        "grid": list(GRID),
        "choice_of_c": CHOICE_BY_VAL if val_split else CHOICE_WITHOUT_VAL,
    }
    earlier = _earlier(output, settings)
    if earlier and (head_name is None or head_name in list_heads(model.path)):
        logger.info("nothing left to do: %s holds this sweep", output)
        return earlier
    _check_head(model, head_name, feature)

    zero_shot = _zero_shot_head(model, test)
    encoded = {
        role: encode(
            model,
            split,
            ("post", feature) if role == "test" and zero_shot and feature != "post" else (feature,),
            **options,
        )
        for role, split in splits.items()
    }
    rows = {role: Rows(F.normalize(e.features[feature]), e.labels) for role, e in encoded.items()}
    train_rows, val_rows = rows["train"], rows.get("val")
    _check_shots(train, train_rows.labels, shots)  # again: some images may be corrupt
    absent = sorted(set(range(classes)) - set(train_rows.labels.tolist()))
    if absent:
        logger.warning("%d classes have no image in split %r", len(absent), train_split)

    def tested(logits: Callable[[Tensor], Tensor], kind: Feature = feature) -> Scores:
        best = best_classes(logits, encoded["test"].features[kind])
        return score(best, encoded["test"].labels, classes)

    few_shot: list[dict[str, Any]] = []
    for k in shots:
        probes = [few_shot_probe(train_rows, val_rows, classes, k, seed) for seed in range(seeds)]
        accuracies = [tested(probe.logits).acc1 for probe in probes]
        few_shot.append(
            {
                "shots": k,
                "acc1_mean": float(np.mean(accuracies)),
                "acc1_std": float(np.std(accuracies, ddof=1)) if seeds > 1 else None,
                "draws": [
                    {"seed": seed, "acc1": acc1, **_choice(probe)}
                    for seed, (probe, acc1) in enumerate(zip(probes, accuracies, strict=True))
                ],
            }
        )
    full = full_probe(train_rows, val_rows, classes)
    scores = tested(full.logits)
    result = {
        "task": "sweep",
        "model": str(model.path),
        "dataset": str(dataset),
        **settings,
        "samples": {role: len(e.labels) for role, e in encoded.items()},
        "failed": {role: e.failed for role, e in encoded.items()},
        "classes": classes,
        "classes_absent_from_train": [train.class_names[label] for label in absent],
        "majority_class_share": scores.majority_class_share,
        "zero_shot": asdict(tested(zero_shot.logits, "post")) if zero_shot else None,
        "few_shot": few_shot,
        "full": {**asdict(scores), **_choice(full)},
        "head": head_name,
    }
    if output:
        _write(output, result)
    if head_name and feature != "pixels":  # last, so that a sweep killed before is run again
        head = Head(full.weight, full.bias, train.class_names, "probe", feature, model.fingerprint)
        save_head(model.path, head_name, head)
    return result


def _choice(probe: Probe) -> dict[str, Any]:
    """How C was chosen. At an end of the grid a better C may lie beyond it."""
    return {
        "train_samples": probe.train_samples,
        "c": probe.c,
        "c_at_grid_end": probe.c in (GRID[0], GRID[-1]),
        "val_acc1": probe.val_acc1,
    }


def _check_shots(train: Split, labels_N: Tensor, shots: Sequence[int]) -> None:
    counts = labels_N.bincount()
    counts[counts == 0] = counts.max()  # an absent class is reported, not drawn from
    label, fewest = int(counts.argmin()), int(counts.min())
    if too_many := [k for k in shots if k > fewest]:
        enough = ",".join(str(k) for k in shots if k <= fewest)
        raise ProbeError(
            f"class {train.class_names[label]!r} has {fewest} usable images in split "
            f"{train.name!r} of {train.path}, fewer than {too_many[0]} shots: "
            f"use --shots '{enough}'"
        )


def _check_head(model: LoadedModel, name: str | None, feature: Feature) -> None:
    if name and feature == "pixels":
        raise ProbeError("a probe on pixels is no head of a model: leave --save-head out")
    if name in list_heads(model.path):
        raise ProbeError(f"{model.path} has a head {name!r} already: give --save-head another name")


def _zero_shot_head(model: LoadedModel, data: Split) -> Head | None:
    """The head to compare probes with; None where the set has no templates."""
    if not (data.path / "zeroshot_classification_templates.txt").is_file():
        return None
    return build_head(model, data.class_names, read_templates(data.path), allow_duplicates=True)


def _earlier(output: Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results that `output` holds, if they are of these settings."""
    if output is None or not (output / "sweep.json").is_file():
        return None
    result: dict[str, Any] = json.loads((output / "sweep.json").read_text())
    if differ := [key for key, value in settings.items() if result.get(key) != value]:
        raise ProbeError(
            f"{output}/sweep.json holds another sweep (it differs in {', '.join(differ)}): "
            "choose another --output or remove it"
        )
    return result


def _write(output: Path, result: dict[str, Any]) -> None:
    """shots.png, then sweep.json, each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    plot, text = output / f".shots.{os.getpid()}.png", output / f".sweep.{os.getpid()}.json"
    plot_shots(result, plot)
    text.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(plot, output / "shots.png")
    os.replace(text, output / "sweep.json")
