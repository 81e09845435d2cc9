"""Which head scores which set of a curve, at every alpha."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from clip_models import Head, LoadedModel, build_head, list_heads, load_head

from clip_finetune.classes import fit_head, knows, require_post
from clip_finetune.errors import FinetuneError
from clip_finetune.interpolate import blend_heads, starting_head
from clip_finetune.labelled_set import LabelledSet
from clip_finetune.tower import blend_tower


def heads_of(
    base: LoadedModel,
    finetuned: LoadedModel,
    data: LabelledSet,
    alphas: Sequence[float],
    *,
    asked: str,
    control: bool,
) -> list[Head]:
    """The set's head at every alpha, its classes in the set's order.

    A trained head of FINETUNED that has the set's classes, blended with the one it started from;
    else the set's own zero-shot head, by the text tower at that alpha.

    Args:
        asked: the head that is to score all sets but those of `control`; "" for none.
        control: the set is there to see what is lost: it need not have a trained head's classes.

    Raises:
        FinetuneError: two trained heads would do, or none has the classes of a set that is no
            control; or a head without the set's classes was asked for.
    """
    device = base.model.logit_scale.device
    name = asked if asked and not control else _trained_head(finetuned, data, control)
    if name is None:
        heads = _zero_shot(base, finetuned, data, alphas)
    else:
        end = load_head(finetuned.path, name)
        require_post(name, end)
        start = end
        if end.kind == "fine-tuned":
            start = starting_head(base.path, finetuned.path, name, base)
        elif name in list_heads(base.path):
            start = load_head(base.path, name)
        heads = [blend_heads([start, end], [1 - alpha, alpha]) for alpha in alphas]
        what = f"head {name!r} for {data.path}"
        heads = [fit_head(head, data.class_names, what) for head in heads]
    return [replace(h, weight=h.weight.to(device), bias=h.bias.to(device)) for h in heads]


def _trained_head(finetuned: LoadedModel, data: LabelledSet, control: bool) -> str | None:
    """The trained head that a set is scored with; None: its zero-shot head."""
    trained = {name: load_head(finetuned.path, name) for name in list_heads(finetuned.path)}
    trained = {name: head for name, head in trained.items() if head.kind == "fine-tuned"}
    fitting = [name for name, head in trained.items() if knows(head, data.class_names)]
    if data.name in fitting or len(fitting) == 1:
        return data.name if data.name in fitting else fitting[0]
    if fitting:
        raise FinetuneError(
            f"{data.path}: the trained heads {', '.join(fitting)} of {finetuned.path} all have its "
            "classes; say which one with --head"
        )
    if trained and not control:
        name, head = next(iter(trained.items()))
        fit_head(head, data.class_names, f"head {name!r} for {data.path}")  # says what is missing
    return None


def _zero_shot(
    base: LoadedModel, finetuned: LoadedModel, data: LabelledSet, alphas: Sequence[float]
) -> list[Head]:
    def built() -> Head:
        return build_head(base, data.class_names, data.templates, allow_duplicates=True)

    theta0, theta1 = base.model.state_dict(), finetuned.model.state_dict()
    text = [name for name in theta0 if not name.startswith("visual.")]
    if all(torch.equal(theta0[name], theta1[name]) for name in text):
        return [built()] * len(alphas)
    kept = {name: theta0[name].clone() for name in text}
    heads: list[Head] = []
    for alpha in alphas:
        blend_tower(base.model, kept, theta1, alpha)
        heads.append(built())
    blend_tower(base.model, kept, theta1, 0.0)
    return heads
