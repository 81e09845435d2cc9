"""The ID/OOD curve: accuracy at every alpha on every set, each image decoded once."""

import json
import logging
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clip_models import LoadedModel, fingerprint_of, load_model, read_model_config

from clip_finetune.choice import Scores, choose
from clip_finetune.config import CurveConfig
from clip_finetune.errors import FinetuneError
from clip_finetune.identity import refuse_other, refuse_other_kind
from clip_finetune.labelled_set import LabelledSet, open_set
from clip_finetune.scoring import Hits, score_all
from clip_finetune.set_heads import heads_of
from clip_finetune.tasks import refuse_same_names

log = logging.getLogger(__name__)

_ROLES = ("id", "ood", "control")
# Beside the models and the sets, what decides the result; not where sets lie or how fast they go.
_FREE = {*_ROLES, "split", "val_split", "batch_size", "workers", "device"}


def measure_curve(base: Path, finetuned: Path, out: Path, config: CurveConfig) -> dict[str, Any]:
    """Measure the curve and write curve.json and curve.png into the folder `out`.

    Alpha is chosen on validation splits, never on `split`, by `choice.choose`.

    Returns:
        What curve.json holds: the models, sets and arguments; `points`, one per alpha, each with
        `test` and `validation` (`choice.Scores.point`) and, where there is OOD, `gains`: on
        `split`, its mean of ID and OOD less that of either end; `chosen`, a point.

    Raises:
        FinetuneError: models of different configuration or text tower, a set given twice, a set
            without the split, a validation split that `finetuned` was trained on, more than 5%
            corrupt images, an `out` with another curve; heads and sets whose classes do not fit
            (`set_heads.heads_of`).
        ModelError: from a model directory or a set's class names and templates.
    """
    refuse_other_kind(finetuned, *(asdict(read_model_config(p)[0]) for p in (finetuned, base)))
    tested = {role: _open(getattr(config, role), config.split) for role in _ROLES}
    refuse_same_names([data for sets in tested.values() for data in sets])
    chosen_on = {"best-id": ("id", "control"), "best-mean": _ROLES, "fixed": ()}[config.rule]
    checked = {role: _open(getattr(config, role), config.val_split) for role in chosen_on}
    _refuse_trained_on(finetuned, [data for sets in checked.values() for data in sets])
    everything = [
        (key, role, data)
        for key, of_role in (("test", tested), ("validation", checked))
        for role, sets in of_role.items()
        for data in sets
    ]
    alphas = config.points
    run: dict[str, Any] = {
        "base": fingerprint_of(base),
        "finetuned": fingerprint_of(finetuned),
        **{name: value for name, value in asdict(config).items() if name not in _FREE},
        "alphas": alphas,
        **{role: [data.name for data in sets] for role, sets in tested.items()},
        "sets": [_describe(data) for _, _, data in everything],
    }
    done = out / "curve.json"
    if done.is_file():
        written = json.loads(done.read_text())
        refuse_other(done, written, run)
        log.info("%s is finished: nothing left to do", done)
        return written

    ends = _load_ends(base, finetuned, config.device)
    named = {data.name: (data, role == "control") for _, role, data in everything}
    head_of = {  # a set's splits share its heads
        name: heads_of(*ends, data, alphas, asked=config.head, control=control)
        for name, (data, control) in named.items()
    }
    sets = [data for _, _, data in everything]
    heads = [head_of[data.name] for data in sets]
    hits, corrupt = score_all(
        *ends, sets, heads, alphas, batch_size=config.batch_size, workers=config.workers
    )
    scores: dict[str, Scores] = {}
    for key in ("test", "validation"):
        by_role: dict[str, dict[str, Hits]] = {role: {} for role in _ROLES}
        for (which, role, data), hits_AN in zip(everything, hits, strict=True):
            if which == key:
                by_role[role][data.name] = hits_AN
        scores[key] = Scores(by_role)
    points: list[dict[str, Any]] = [
        {"alpha": alpha, **{key: scores[key].point(number) for key in scores}}
        for number, alpha in enumerate(alphas)
    ]
    if tested["ood"]:
        for number, point in enumerate(points):
            point["gains"] = {
                f"over alpha {end}": scores["test"].gain(number, alphas.index(end))
                for end in (0, 1)
            }
    result: dict[str, Any] = {
        "tool": f"clip-finetune {version('clip-finetune')}",
        **run,
        "corrupt": {f"{s.name}/{s.split}": n for s, n in zip(sets, corrupt, strict=True)},
        "heads": {name: heads[-1].kind for name, heads in head_of.items()},
        "points": points,
        "chosen": choose(points, config),
    }
    _write(out, result)
    return result


def _open(paths: tuple[Path, ...], split: str) -> list[LabelledSet]:
    return [open_set(path, split) for path in paths]


def _refuse_trained_on(finetuned: Path, checked: list[LabelledSet]) -> None:
    """The largest alpha would look best on what was learned by heart.

    Of the same split, because a fingerprint holds no pixels: two splits can have the same sizes.
    """
    provenance = read_model_config(finetuned)[1].get("provenance") or {}
    learned = {(task["split"], task["data"]) for task in provenance.get("tasks", [])}
    for data in checked:
        if (data.split, data.fingerprint()) in learned:
            raise FinetuneError(
                f"{finetuned} was trained on {data.path / data.split}, so alpha cannot be chosen "
                "on it; name another --val-split, or use --rule fixed"
            )


def _describe(data: LabelledSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "split": data.split,
        "samples": len(data),
        "classes": len(data.class_names),
        "data": data.fingerprint(),
    }


def _load_ends(base: Path, finetuned: Path, device: str) -> tuple[LoadedModel, LoadedModel]:
    """Both models, if one transform serves them."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ends = load_model(base, device=device), load_model(finetuned, device=device)
    if ends[0].preprocess.hash != ends[1].preprocess.hash:
        raise FinetuneError(
            f"{finetuned} prepares images otherwise than {base} (preprocess_cfg); "
            "expected a model that clip-finetune train made of it"
        )
    return ends


def _write(out: Path, result: dict[str, Any]) -> None:
    """The plot first: curve.json marks the folder complete."""
    from clip_finetune.plots import plot_curve

    out.mkdir(parents=True, exist_ok=True)
    plot_curve(result, out / ".curve.png")
    os.replace(out / ".curve.png", out / "curve.png")
    temporary = out / ".curve.json"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, out / "curve.json")
