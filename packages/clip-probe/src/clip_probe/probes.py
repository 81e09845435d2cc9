"""Linear probes on frozen features: full data and few shots, regularised as validation says.

How C is chosen, never on a test split:
- Full data: by accuracy on the validation split, or, without one, on a fifth of train (stratified,
  seed 0). The probe is then fitted again on train and validation together.
- k shots: by accuracy on the validation split, which is used for nothing else. Without one, by
  cross-validation within the draw (min(k, 5) folds), so that no further label is used; one shot
  cannot be divided, so there C is ONE_SHOT_C.
- Among equals the smallest C, the simplest probe.
"""

# N samples, D features, C classes, R regularisations, P classes present, K shots

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_probe.errors import ProbeError
from clip_probe.solver import fit_grid

GRID = tuple(10 ** (half / 2) for half in range(-4, 13))  # C from 0.01 to 1e6
ONE_SHOT_C = 1.0
NEVER = -1e30  # bias of a class without training images: below every other logit, and finite

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier and how its C was chosen."""

    weight: Tensor  # [C, D] float32
    bias: Tensor  # [C] float32
    c: float
    val_acc1: (
        list[float] | None
    )  # validation accuracy of each C of GRID; None where C was not chosen
    train_samples: int

    def logits(self, features_ND: Tensor) -> Tensor:
        """Features of any length [N, D] -> [N, C], as a class head defines it."""
        return F.linear(F.normalize(features_ND, dim=-1), self.weight, self.bias)


def full_probe(train: Rows, val: Rows | None, classes: int) -> Probe:
    """A probe on all of train (and val).

    Raises:
        ProbeError: no val, and no class has the five images that holding a fifth out takes.
    """
    if val is not None:
        return _choose_and_fit([(train, val)], train.join(val), classes)
    held_N = held_out_fifth(train.labels)
    if not held_N.any():
        raise ProbeError(
            "no class of the training split has 5 images, so none can be held out to choose C: "
            "give a validation split with --val-split"
        )
    return _choose_and_fit([(train.pick(~held_N), train.pick(held_N))], train, classes)


def few_shot_probe(train: Rows, val: Rows | None, classes: int, shots: int, seed: int) -> Probe:
    """A probe on `shots` images of each class, drawn by `seed`."""
    rows_PK = few_shot_draw(train.labels, shots, seed)
    draw = train.pick(rows_PK.flatten())
    if val is not None:
        return _choose_and_fit([(draw, val)], draw, classes)
    if shots == 1:
        return _choose_and_fit([], draw, classes)
    folds = min(shots, 5)
    fold_K = torch.arange(shots) % folds
    parts = [
        (
            train.pick(rows_PK[:, fold_K != fold].flatten()),
            train.pick(rows_PK[:, fold_K == fold].flatten()),
        )
        for fold in range(folds)
    ]
    return _choose_and_fit(parts, draw, classes)


def few_shot_draw(labels_N: Tensor, shots: int, seed: int) -> Tensor:
    """Row numbers [P, K] of `shots` images of each class present.

    A function of its arguments alone: of no global random state. Draws of one seed are nested:
    the images of k shots are among those of more shots.
    """
    draws = [rows[:shots] for rows in _shuffled_classes(labels_N, seed)]
    return torch.stack(draws)


def held_out_fifth(labels_N: Tensor, seed: int = 0) -> Tensor:
    """A mask [N] of a fifth of each class, rounded down; a function of its arguments alone."""
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


def _choose_and_fit(folds: Sequence[tuple[Rows, Rows]], everything: Rows, classes: int) -> Probe:
    """Fit the grid on each fold's first rows, choose C by its second; fit `everything` with it."""
    correct_R = torch.zeros(len(GRID))
    for fitted, held in folds:
        weight_RCD, bias_RC = _fit(fitted, classes, GRID)
        for r, (weight_CD, bias_C) in enumerate(zip(weight_RCD, bias_RC, strict=True)):
            predicted_N = F.linear(held.features, weight_CD, bias_C).argmax(1)
            correct_R[r] += (predicted_N == held.labels).sum()
    c, val_acc1 = ONE_SHOT_C, None
    if folds:
        c = GRID[int(correct_R.argmax())]  # the first of equals
        held_samples = sum(len(held.labels) for _, held in folds)
        val_acc1 = [correct / held_samples for correct in correct_R.tolist()]
    weight_1CD, bias_1C = _fit(everything, classes, [c])
    return Probe(weight_1CD[0], bias_1C[0], c, val_acc1, len(everything.labels))


def _fit(rows: Rows, classes: int, grid: Sequence[float]) -> tuple[Tensor, Tensor]:
    """float32 weight [R, C, D] and bias [R, C]; a class without images is never predicted."""
    present_P, compact_N = rows.labels.unique(return_inverse=True)
    fit = fit_grid(rows.features, compact_N, len(present_P), grid)
    if not fit.converged.all():
        unfinished = [c for c, ok in zip(grid, fit.converged.tolist(), strict=True) if not ok]
        logger.warning("the probes with C = %s stopped short of the optimum", unfinished)
    weight_RCD = torch.zeros(len(grid), classes, rows.features.shape[1])
    bias_RC = torch.full((len(grid), classes), NEVER)
    weight_RCD[:, present_P], bias_RC[:, present_P] = fit.weight.float(), fit.bias.float()
    return weight_RCD, bias_RC
