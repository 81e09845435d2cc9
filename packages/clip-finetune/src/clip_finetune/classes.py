"""Heads and sets of different classes: which rows of a head are a set's classes, by name."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from clip_models import Head

from clip_finetune.errors import FinetuneError


def fit_head(head: Head, class_names: Sequence[str], what: str) -> Head:
    """The head's rows for these classes, in their order: a permutation or a subset of its own.

    Args:
        what: the head and the set, for messages.

    Raises:
        FinetuneError: a class that the head does not know, or knows twice.
    """
    names = tuple(class_names)
    if names == head.class_names:
        return head  # also where a name comes twice: rows and classes correspond one by one
    counts = Counter(head.class_names)
    if missing := [name for name in names if not counts[name]]:
        raise FinetuneError(
            f"{what}: {len(missing)} of {len(names)} classes are not the head's, the first "
            f"{missing[0]!r}; it has {len(head.class_names)}, the first {head.class_names[0]!r}. "
            "Names must be equal letter by letter"
        )
    twice = [n for n in dict.fromkeys(names) if counts[n] > 1 or names.count(n) > 1]
    if twice:
        raise FinetuneError(
            f"{what}: the class name {twice[0]!r} comes more than once, so it is not clear which "
            "row of the head it is; make the names distinct, or give both the same list"
        )
    row_of = {name: row for row, name in enumerate(head.class_names)}
    rows = torch.tensor([row_of[name] for name in names], device=head.weight.device)
    return replace(head, weight=head.weight[rows], bias=head.bias[rows], class_names=names)


def knows(head: Head, class_names: Sequence[str]) -> bool:
    """Whether every class is one of the head's."""
    return set(class_names) <= set(head.class_names)


def require_post(name: str, head: Head) -> None:
    """Raises FinetuneError for a head on features that the interpolated embedding is not."""
    if head.feature != "post":
        raise FinetuneError(
            f"head {name!r} reads features before the projection; expected a head on the "
            "projected features (clip-probe saves one with --feature post)"
        )


def head_hash(head: Head) -> str:
    """Which weights these are."""
    digest = hashlib.sha256(head.weight.numpy().tobytes() + head.bias.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
