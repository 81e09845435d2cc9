"""`clip-finetune interpolate` and `soup`: a model directory from two or several, heads included."""

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clip_models import (
    Head,
    LoadedModel,
    build_head,
    fingerprint_of,
    list_heads,
    load_head,
    load_model,
    read_model_config,
    save_head,
)

from clip_finetune.classes import fit_head
from clip_finetune.errors import FinetuneError
from clip_finetune.identity import refuse_other, refuse_other_kind
from clip_finetune.weights import combine, write_combination

log = logging.getLogger(__name__)


def interpolate_models(
    base: Path, finetuned: Path, out: Path, alpha: float, *, extrapolate: bool = False
) -> dict[str, Any]:
    """Write the model at `alpha` between `base` (0) and `finetuned` (1) as directory `out`.

    One tensor of either model is in memory at a time. A head that `train` trained is blended with
    the one that it started from: a head of `base`, or the zero-shot head that its text tower makes.

    Raises:
        FinetuneError: alpha outside [0, 1] unless `extrapolate`, towers that differ in
            configuration or shape, an `out` that is something else.
        ModelError: from either model directory.
    """
    if not (0 <= alpha <= 1 or (extrapolate and math.isfinite(alpha))):
        raise FinetuneError(
            f"alpha is {alpha}; expected 0 to 1 (--extrapolate allows other numbers)"
        )
    run = {"base": fingerprint_of(base), "finetuned": fingerprint_of(finetuned), "alpha": alpha}
    sources = {"command": "interpolate", "base_provenance": _provenance(base)}
    sources["finetuned_provenance"] = _provenance(finetuned)
    return _write([base, finetuned], [1 - alpha, alpha], out, run, sources)


def soup_models(
    models: Sequence[Path],
    out: Path,
    weights: Sequence[float] = (),
    *,
    extrapolate: bool = False,
) -> dict[str, Any]:
    """Write the weighted mean of several models as directory `out` (2203.05482).

    Args:
        weights: of the models in order, with the sum 1; none: all the same (the uniform soup).

    Raises:
        FinetuneError: fewer than two models, weights that are not one for each or do not add up to
            1, negative ones unless `extrapolate`, and as `interpolate_models`.
    """
    if len(models) < 2:
        raise FinetuneError(f"a soup is of two models or more; found {len(models)}")
    shares = list(weights) or [1 / len(models)] * len(models)
    if len(shares) != len(models):
        raise FinetuneError(f"{len(shares)} --weights for {len(models)} models; give one for each")
    if not abs(sum(shares) - 1) <= 1e-6:  # nor where one is NaN
        raise FinetuneError(f"--weights add up to {sum(shares):g}; expected 1")
    if min(shares) < 0 and not extrapolate:
        raise FinetuneError(
            f"--weights holds {min(shares):g}; expected 0 to 1 (--extrapolate allows others)"
        )
    run = {"models": [fingerprint_of(model) for model in models], "weights": shares}
    sources = {"command": "soup", "model_provenances": [_provenance(model) for model in models]}
    return _write(models, shares, out, run, sources)


def starting_head(
    base: Path, finetuned: Path, name: str, loaded: LoadedModel | None = None
) -> Head:
    """What is at the other end of `finetuned`'s trained head `name`.

    The head that `train` started from when it made the model out of `base`, as its provenance says:
    a saved one, or the zero-shot head of these prompts. For other models, `base`'s of that name.

    Args:
        loaded: `base`, where it is in memory anyway.

    Raises:
        FinetuneError: neither is known.
        ModelError: it was a saved head, which `base` has no more.
    """
    provenance = _provenance(finetuned)
    tasks = {task["name"]: task for task in provenance.get("tasks", [])}
    classes = load_head(finetuned, name).class_names
    if provenance.get("base") == fingerprint_of(base) and name in tasks:
        task = tasks[name]
        if "templates" in task:
            loaded = loaded or load_model(base)
            return build_head(loaded, classes, task["templates"], allow_duplicates=True)
        head = load_head(base, task["head_name"])
        return fit_head(head, classes, f"head {task['head_name']!r} of {base}")
    if name in list_heads(base):
        return fit_head(load_head(base, name), classes, f"head {name!r} of {base}")
    raise FinetuneError(
        f"{finetuned} has the trained head {name!r}, and neither says which head of {base} it "
        "started from, nor has that a head of this name; expected what clip-finetune train made "
        "of this very model"
    )


def blend_heads(heads: Sequence[Head], coefficients: Sequence[float]) -> Head:
    """The combination of heads of the same classes; an end is that head itself."""
    if [share for share in coefficients if share] == [1]:
        return heads[list(coefficients).index(1)]
    return replace(
        heads[0],
        weight=combine([head.weight for head in heads], coefficients),
        bias=combine([head.bias for head in heads], coefficients),
        kind="interpolated",
        templates_hash=None,
    )


def _write(
    models: Sequence[Path],
    coefficients: Sequence[float],
    out: Path,
    run: dict[str, Any],
    sources: dict[str, Any],
) -> dict[str, Any]:
    config, values = read_model_config(models[0])
    for model in models[1:]:
        refuse_other_kind(model, asdict(read_model_config(model)[0]), asdict(config))
    if out.exists():
        refuse_other(out, _provenance(out), run)
        log.info("%s is finished: nothing left to do", out)
        return {"status": "nothing left to do", **_result(out, run)}
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)  # of a command that was killed
    building.mkdir(parents=True)
    try:
        tool = f"clip-finetune {version('clip-finetune')}"
        provenance = {"tool": tool, **run, **sources}
        written = values | {"provenance": provenance}
        same_text = write_combination(models, coefficients, building, written)
        fingerprint = fingerprint_of(building)
        for name, head in _heads(models, coefficients, building, same_text, "alpha" in run).items():
            save_head(building, name, replace(head, fingerprint=fingerprint))
        os.rename(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    done = "interpolated" if "alpha" in run else "averaged"
    return {"status": done, **_result(out, run)}


def _heads(
    models: Sequence[Path],
    coefficients: Sequence[float],
    building: Path,
    same_text: bool,
    of_pair: bool,
) -> dict[str, Head]:
    """The heads of the combined model.

    A zero-shot head belongs to the text tower: where all models have the same one, it is the
    combined model's head as it is; else the combined text tower makes it anew. A trained head of a
    pair is blended with the one that it started from, any other where all models have it.
    """
    owned = [{name: load_head(model, name) for name in list_heads(model)} for model in models]
    heads: dict[str, Head] = {}
    for name in dict.fromkeys(name for mine in reversed(owned) for name in mine):
        having = [mine[name] for mine in owned if name in mine]
        if all(head.kind == "zero-shot" for head in having):
            made = having[-1] if same_text else _made_anew(models, building, name, having[-1])
        elif of_pair and name in owned[1] and owned[1][name].kind == "fine-tuned":
            start = starting_head(models[0], models[1], name)
            made = blend_heads([start, owned[1][name]], coefficients)
        elif len(having) == len(models):
            made = _blended(having, coefficients)
        else:
            made = None
        if made is None:
            log.warning("head %s is left out: not one of the same classes in all models", name)
        else:
            heads[name] = made
    return heads


def _blended(heads: Sequence[Head], coefficients: Sequence[float]) -> Head | None:
    """Heads of the same classes, those of later ones by name where names come once."""
    names = heads[0].class_names
    distinct = len(set(names)) == len(names)
    alike = {
        (tuple(sorted(head.class_names)) if distinct else head.class_names, head.feature)
        for head in heads
    }
    if len(alike) > 1:
        return None
    return blend_heads([fit_head(head, names, "a head") for head in heads], coefficients)


def _made_anew(models: Sequence[Path], building: Path, name: str, head: Head) -> Head | None:
    """The zero-shot head of the combined text tower, where a model's provenance has the prompts."""
    tasks = [task for model in models for task in _provenance(model).get("tasks", [])]
    prompts = [task["templates"] for task in tasks if task["name"] == name and "templates" in task]
    if not prompts:
        return None
    return build_head(load_model(building), head.class_names, prompts[-1], allow_duplicates=True)


def _provenance(model: Path) -> dict[str, Any]:
    return read_model_config(model)[1].get("provenance") or {}


def _result(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    return {"out": str(out), "fingerprint": fingerprint_of(out), **run, "heads": list_heads(out)}
