"""Weight-space interpolation: theta = (1 - alpha) theta0 + alpha theta1 (WiSE-FT, Eq. 1).

WiSE-FT (Wortsman et al., 2109.01903) and PAINT (Ilharco et al., 2208.05592) share the formula:
theta0 is the zero-shot model, theta1 the fine-tuned one.
"""

import logging
import os
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clip_models import (
    CLIP,
    Head,
    fingerprint_of,
    list_heads,
    load_head,
    load_model,
    read_model_config,
    save_head,
    save_model,
)
from safetensors import safe_open
from torch import Tensor

from clip_finetune.errors import FinetuneError
from clip_finetune.identity import refuse_other, refuse_other_kind

log = logging.getLogger(__name__)


def blend(theta0: Tensor, theta1: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) theta0 + alpha theta1; exact at both ends and where the two are equal.

    Integers (BatchNorm's counters) cannot be blended: they come from the nearer end.
    """
    if alpha == 0 or (alpha < 0.5 and not theta0.is_floating_point()):
        return theta0
    if alpha == 1 or not theta0.is_floating_point():
        return theta1
    return torch.lerp(theta0, theta1, alpha)


def interpolate_models(
    base: Path, finetuned: Path, out: Path, alpha: float, *, extrapolate: bool = False
) -> dict[str, Any]:
    """Write the model at `alpha` between `base` (0) and `finetuned` (1) as directory `out`.

    Only one model and one tensor of the other are in memory. Heads follow: see `_heads`.

    Raises:
        FinetuneError: alpha outside [0, 1] unless `extrapolate`, towers that differ in
            configuration or shape, an `out` that is something else.
        ModelError: from either model directory.
    """
    if not (extrapolate or 0 <= alpha <= 1):
        raise FinetuneError(f"alpha is {alpha}; expected 0 to 1 (--extrapolate allows others)")
    refuse_other_kind(finetuned, *(asdict(read_model_config(p)[0]) for p in (finetuned, base)))
    run = {"base": fingerprint_of(base), "finetuned": fingerprint_of(finetuned), "alpha": alpha}
    if out.exists():
        refuse_other(out, read_model_config(out)[1].get("provenance", {}), run)
        log.info("%s is finished: nothing left to do", out)
        return {"status": "nothing left to do", **_result(out, run)}

    loaded = load_model(base)
    same_text = _blend_into(loaded.model, finetuned, alpha)
    building = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        provenance = {
            "tool": f"clip-finetune {version('clip-finetune')}",
            "command": "interpolate",
            **run,
            "base_provenance": loaded.provenance,
            "finetuned_provenance": read_model_config(finetuned)[1].get("provenance"),
        }
        save_model(building, loaded.model, loaded.preprocess, provenance, loaded.tokenizer)
        fingerprint = fingerprint_of(building)
        for name, head in _heads(base, finetuned, alpha, same_text).items():
            save_head(building, name, replace(head, fingerprint=fingerprint))
        os.rename(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {"status": "interpolated", **_result(out, run)}


def _blend_into(model: CLIP, finetuned: Path, alpha: float) -> bool:
    """Blend the weights of `finetuned` into `model`, one by one; True: text towers are equal."""
    same_text = True
    with safe_open(finetuned / "open_clip_model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name, theta0 in model.state_dict().items():
            # open_clip's older layout holds the text tower without a prefix
            stored = name if name in names else name.removeprefix("text.")
            if stored not in names:
                raise FinetuneError(f"{finetuned}: no weight {stored}; expected base's weights")
            names.remove(stored)
            theta1 = file.get_tensor(stored).to(theta0.dtype)
            if theta0.shape != theta1.shape:
                raise FinetuneError(
                    f"{finetuned}: {stored} has the shape {list(theta1.shape)}, "
                    f"base has {list(theta0.shape)}; expected two states of one model"
                )
            same_text &= name.startswith("visual.") or torch.equal(theta0, theta1)
            theta0.copy_(blend(theta0, theta1, alpha))
    if names:
        raise FinetuneError(f"{finetuned}: {min(names)} is a weight that base does not have")
    return same_text


def _heads(base: Path, finetuned: Path, alpha: float, same_text: bool) -> dict[str, Head]:
    """The heads of the blended model.

    A zero-shot head belongs to the text tower: where both models have the same one, it is the
    blended model's head as it is. Any other head is blended where both models have it.
    """
    theirs = {name: load_head(finetuned, name) for name in list_heads(finetuned)}
    ours = {name: load_head(base, name) for name in list_heads(base)}
    heads: dict[str, Head] = {}
    for name, head in (ours | theirs).items():
        if same_text and head.kind == "zero-shot":
            heads[name] = head
        elif name in ours and name in theirs and _alike(ours[name], theirs[name]):
            heads[name] = replace(
                ours[name],
                weight=blend(ours[name].weight, theirs[name].weight, alpha),
                bias=blend(ours[name].bias, theirs[name].bias, alpha),
                kind="interpolated",
            )
        else:
            log.warning("head %s is left out: not the same classes in both models", name)
    return heads


def _alike(one: Head, other: Head) -> bool:
    return one.class_names == other.class_names and one.feature == other.feature


def _result(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    return {"out": str(out), "fingerprint": fingerprint_of(out), **run, "heads": list_heads(out)}
