"""Which rows a probe is fitted on and judged by: draws, folds, a held-out fifth.

Functions of seed and labels alone: no global random state, no model, no cache changes a draw.
"""

# N samples, D features, P classes present, K shots

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip_probe.errors import ProbeError


class Rows(NamedTuple):
    """Features of length 1 and their labels."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N]

    def pick(self, index: Tensor) -> "Rows":
        """The rows of a mask or of row numbers."""
        return Rows(self.features[index], self.labels[index])

    def join(self, other: "Rows") -> "Rows":
        """These rows and then the others."""
        features = torch.cat([self.features, other.features])
        return Rows(features, torch.cat([self.labels, other.labels]))


class Task(NamedTuple):
    """One probe to find."""

    folds: list[tuple[Rows, Rows]]  # fit every setting on the first, judge it by the second
    final: Rows  # and fit the best setting on these


def full_task(train: Rows, val: Rows | None) -> Task:
    """All of train: judged by val and then fitted on both, or judged by a held-out fifth.

    Raises:
        ProbeError: no val, and no class has the five images that holding a fifth out takes.
    """
    if val is not None:
        return Task([(train, val)], train.join(val))
    held_N = held_out_fifth(train.labels)
    if not held_N.any():
        raise ProbeError(
            "no class of the training split has 5 images, so none can be held out to choose C: "
            "give a validation split with --val-split"
        )
    return Task([(train.pick(~held_N), train.pick(held_N))], train)


def few_shot_task(train: Rows, val: Rows | None, shots: int, seed: int) -> Task:
    """`shots` images of each class, judged by val or by min(shots, 5) folds of themselves.

    One shot cannot be divided: without val it has no folds.
    """
    rows_PK = few_shot_draw(train.labels, shots, seed)
    draw = train.pick(rows_PK.flatten())
    if val is not None:
        return Task([(draw, val)], draw)
    folds = min(shots, 5) if shots > 1 else 0
    fold_K = torch.arange(shots) % max(folds, 1)
    parts = [
        (
            train.pick(rows_PK[:, fold_K != fold].flatten()),
            train.pick(rows_PK[:, fold_K == fold].flatten()),
        )
        for fold in range(folds)
    ]
    return Task(parts, draw)


def few_shot_draw(labels_N: Tensor, shots: int, seed: int) -> Tensor:
    """Row numbers [P, K] of `shots` images of each class present.

    Draws of one seed are nested: the images of k shots are among those of more shots.
    """
    draws = [rows[:shots] for rows in _shuffled_classes(labels_N, seed)]
    return torch.stack(draws)


def held_out_fifth(labels_N: Tensor, seed: int = 0) -> Tensor:
    """A mask [N] of a fifth of each class, rounded down."""
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for rows in _shuffled_classes(labels_N, seed):
        held_N[rows[: len(rows) // 5]] = True
    return held_N


def _shuffled_classes(labels_N: Tensor, seed: int) -> list[Tensor]:
    """The row numbers of each class present, in an order of the seed's and the class's own."""
    labels = labels_N.numpy()
    return [
        torch.from_numpy(
            np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        )
        for label in np.unique(labels)
    ]
