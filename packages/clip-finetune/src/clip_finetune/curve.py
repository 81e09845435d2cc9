"""The ID/OOD curve: accuracy at every alpha on every set, each image decoded once.

For each batch the image tower takes the weights of one alpha after the other; blending them anew
costs one pass over the weights, little beside encoding a batch, and needs the memory of three
towers however many alphas there are. Every set is scored by its zero-shot head, which belongs to
the text tower that fine-tuning leaves alone.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from clip_models import (
    CLIP,
    Head,
    LoadedModel,
    build_head,
    fingerprint_of,
    load_model,
    read_model_config,
)
from torch import Tensor
from tqdm import tqdm

from clip_finetune.batches import EvalBatches, loader, refuse_corrupt
from clip_finetune.errors import FinetuneError
from clip_finetune.identity import refuse_other, refuse_other_kind
from clip_finetune.interpolate import blend
from clip_finetune.labelled_set import LabelledSet, open_set
from clip_finetune.tasks import refuse_same_names

# A alphas, B batch

log = logging.getLogger(__name__)

Rule = Literal["best-id", "best-mean", "fixed"]
FIXED_ALPHA = 0.5  # WiSE-FT's recommendation where nothing can be chosen
ALPHAS = tuple(step / 10 for step in range(11))


def measure_curve(
    base: Path,
    finetuned: Path,
    out: Path,
    *,
    id_set: Path,
    ood_sets: Sequence[Path],
    alphas: Sequence[float] = ALPHAS,
    split: str = "test",
    val_split: str = "val",
    rule: Rule = "best-id",
    batch_size: int = 64,
    workers: int = 4,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure the curve and write curve.json and curve.png into the folder `out`.

    Alpha is chosen on validation splits, never on `split`: the best on the ID set, the best mean
    of ID and mean OOD accuracy, or 0.5. The smallest of equals wins: nearest to zero-shot.

    Returns:
        What curve.json holds: the models, sets and arguments; `points`, one per alpha, each with
        `test` and `validation` (by set: accuracy and its Wilson 95% interval; over sets: `id`,
        `ood`, the mean over the shifted sets, and `mean`, halfway between); `chosen`, a point.

    Raises:
        FinetuneError: models of different configuration or text tower, a set given twice, a set
            without the split, more than 5% corrupt images, an `out` with another curve.
        ModelError: from a model directory or a set's class names and templates.
    """
    _check(alphas, split, val_split, rule)
    refuse_other_kind(finetuned, *(asdict(read_model_config(p)[0]) for p in (finetuned, base)))
    tested = [open_set(path, split) for path in (id_set, *ood_sets)]
    refuse_same_names(tested)
    checked = {"best-id": tested[:1], "best-mean": tested, "fixed": []}[rule]
    validation = [open_set(data.path, val_split) for data in checked]
    run: dict[str, Any] = {
        "base": fingerprint_of(base),
        "finetuned": fingerprint_of(finetuned),
        "rule": rule,
        "alphas": list(alphas),
        "id": tested[0].name,
        "ood": [data.name for data in tested[1:]],
        "sets": [
            {
                "name": data.name,
                "split": data.split,
                "samples": len(data),
                "classes": len(data.class_names),
                "data": data.fingerprint(),
            }
            for data in (*tested, *validation)
        ],
    }
    done = out / "curve.json"
    if done.is_file():
        written = json.loads(done.read_text())
        refuse_other(done, written, run)
        log.info("%s is finished: nothing left to do", done)
        return written

    sets = [*tested, *validation]
    ends = (load_model(base, device=_device(device)), load_model(finetuned, device=_device(device)))
    _refuse_other_pair(*ends)
    hits, corrupt = _count_hits(*ends, sets, alphas, batch_size, workers)
    points = _points(run, sets, hits, corrupt, tested=len(tested))
    result = {
        "tool": f"clip-finetune {version('clip-finetune')}",
        **run,
        "corrupt": {f"{s.name}/{s.split}": n for s, n in zip(sets, corrupt, strict=True)},
        "points": points,
        "chosen": _choose(points, rule),
    }
    _write(out, result)
    return result


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson, 1927)."""
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def _check(alphas: Sequence[float], split: str, val_split: str, rule: Rule) -> None:
    if len(set(alphas)) != len(alphas) or not {0.0, 1.0} <= set(alphas):
        raise FinetuneError(f"--alphas {list(alphas)}: expected each once, with both ends 0 and 1")
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise FinetuneError(f"--alphas {list(alphas)}: expected values from 0 to 1")
    if rule == "fixed" and FIXED_ALPHA not in alphas:
        raise FinetuneError(f"--rule fixed takes alpha {FIXED_ALPHA}; add it to --alphas")
    if rule != "fixed" and split == val_split:
        raise FinetuneError(
            f"--val-split and --split are both {split!r}: alpha would be chosen on the data it is "
            "reported on; name another split, or use --rule fixed"
        )


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def _count_hits(
    base: LoadedModel,
    finetuned: LoadedModel,
    sets: Sequence[LabelledSet],
    alphas: Sequence[float],
    batch_size: int,
    workers: int,
) -> tuple[list[list[int]], list[int]]:
    """(right answers [set][alpha], corrupt images [set])."""
    device = base.model.logit_scale.device
    named = {data.name: data for data in sets}  # a set's splits share its head
    head_of = {name: _head(base, data, device) for name, data in named.items()}
    heads = [head_of[data.name] for data in sets]
    clip = base.model
    theta0 = {name: weight.clone() for name, weight in clip.visual.state_dict().items()}
    theta1 = finetuned.model.visual.state_dict()
    hits, corrupt = [[0] * len(alphas) for _ in sets], [0] * len(sets)
    batches = EvalBatches(sets, base.preprocess, batch_size)
    order = range(len(batches))
    for batch in tqdm(loader(batches, order, workers=workers), desc="curve", disable=None):
        images = base.preprocess.normalize(batch.images.to(device))
        labels = batch.labels.to(device)
        corrupt[batch.source] += batch.corrupt
        refuse_corrupt(sets[batch.source], corrupt[batch.source], 0)
        if not len(labels):
            continue
        for number, alpha in enumerate(alphas):
            _set_tower(clip, theta0, theta1, alpha)
            answers = heads[batch.source].logits(clip.encode_image(images)).argmax(dim=1)
            hits[batch.source][number] += int((answers == labels).sum())
    return hits, corrupt


def _head(base: LoadedModel, data: LabelledSet, device: torch.device) -> Head:
    head = build_head(base, data.class_names, data.templates, allow_duplicates=True)
    return replace(head, weight=head.weight.to(device), bias=head.bias.to(device))


def _set_tower(
    clip: CLIP, theta0: dict[str, Tensor], theta1: dict[str, Tensor], alpha: float
) -> None:
    for name, weight in clip.visual.state_dict().items():
        weight.copy_(blend(theta0[name], theta1[name], alpha))


def _refuse_other_pair(base: LoadedModel, finetuned: LoadedModel) -> None:
    """Raises FinetuneError where one head and one transform cannot serve both models."""
    if base.preprocess.hash != finetuned.preprocess.hash:
        raise FinetuneError(
            f"{finetuned.path} prepares images otherwise than {base.path} (preprocess_cfg); "
            "expected a model that clip-finetune train made of it"
        )
    theirs = finetuned.model.state_dict()
    for name, weight in base.model.state_dict().items():
        if not name.startswith("visual.") and not torch.equal(weight, theirs[name]):
            raise FinetuneError(
                f"{finetuned.path}: {name} is not {base.path}'s; the curve scores with the text "
                "tower that both share. Interpolate directories and evaluate each with clip-probe"
            )


def _points(
    run: dict[str, Any],
    sets: Sequence[LabelledSet],
    hits: list[list[int]],
    corrupt: list[int],
    *,
    tested: int,
) -> list[dict[str, Any]]:
    """A row per alpha: accuracy with interval by set, and the means that rules and plot use."""
    points: list[dict[str, Any]] = []
    for number, alpha in enumerate(run["alphas"]):
        scores: list[dict[str, float]] = []
        for data, counts, lost in zip(sets, hits, corrupt, strict=True):
            count = len(data) - lost
            low, high = wilson(counts[number], count)
            scores.append({"accuracy": counts[number] / count, "low": low, "high": high})
        names = [data.name for data in sets]
        point: dict[str, Any] = {"alpha": alpha}
        for key, part in (("test", slice(tested)), ("validation", slice(tested, None))):
            by_set = dict(zip(names[part], scores[part], strict=True))
            ood = [by_set[name]["accuracy"] for name in run["ood"] if name in by_set]
            point[key] = {"sets": by_set}
            if run["id"] in by_set:
                point[key]["id"] = by_set[run["id"]]["accuracy"]
            if ood:
                point[key]["ood"] = sum(ood) / len(ood)
                point[key]["mean"] = (point[key]["id"] + point[key]["ood"]) / 2
        points.append(point)
    return points


def _choose(points: list[dict[str, Any]], rule: Rule) -> dict[str, Any]:
    if rule == "fixed":
        return next(point for point in points if point["alpha"] == FIXED_ALPHA)
    key = "id" if rule == "best-id" else "mean"
    ordered = sorted(points, key=lambda point: point["alpha"])
    return max(ordered, key=lambda point: point["validation"][key])


def _write(out: Path, result: dict[str, Any]) -> None:
    """The plot first: curve.json marks the folder complete."""
    from clip_finetune.plots import plot_curve

    out.mkdir(parents=True, exist_ok=True)
    plot_curve(result, out / ".curve.png")
    os.replace(out / ".curve.png", out / "curve.png")
    temporary = out / ".curve.json"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, out / "curve.json")
