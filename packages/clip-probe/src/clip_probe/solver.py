"""L2-regularised multinomial logistic regression: grids over sets of rows, all at once.

The objective is scikit-learn's, for every C of the grid, with the intercept b unregularised:

    C * sum_n CE(W x_n + b, y_n) + 0.5 ||W||^2

Features are centred (the intercept absorbs the mean) and rotated to their principal axes, which
leaves ||W|| and so the optimum as they are. Where N < D this drops the D - N directions without
data: W is zero there.

Memory beyond the features given: three times their float64 size for the rotated ones, and about 300
MB for problems of up to MAX_WEIGHTS weights, however many there are; 250 bytes a weight above.
"""

# N samples, D features, K rotated features and a constant, C classes, R regularisations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_probe.errors import ProbeError
from clip_probe.lbfgs import Problems, Sample

TOLERANCE = 1e-7  # of `fit_grids`, and of the command, which must not import this to say so
MAX_WEIGHTS = 2**20  # of the problems solved at once
SMALL = 2**20  # logits; below, one thread


@dataclass(frozen=True)
class Fit:
    """The optimum for each C of the grid, in the coordinates of the features given; float64."""

    weight: Tensor  # [R, C, D]
    bias: Tensor  # [R, C]
    objective: Tensor  # [R] scikit-learn's, at the solution
    converged: Tensor  # [R] bool: False where max_iterations or rounding came first


def fit_grid(
    features_ND: Tensor,
    labels_N: Tensor,
    classes: int,
    grid: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = 3000,
) -> Fit:
    """Fit one logistic regression per C in `grid`, all over the same data: see `fit_grids`."""
    (fit,) = fit_grids(
        [(features_ND, labels_N)],
        classes,
        [grid],
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return fit


def fit_grids(
    data: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    grids: Sequence[Sequence[float]],
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = 3000,
) -> list[Fit]:
    """Fit one logistic regression per C on each set of rows (draws, folds), all together.

    All on the device of the features.

    Args:
        data: features [N, D] of any floating type and labels [N] int64, each of 0 … classes - 1 at
            least once (an intercept without a sample has no optimum).
        classes: C.
        grids: for each set the values of C, scikit-learn's inverse regularisation.
        tolerance: stop where the objective is estimated to be above its optimum by no more than
            this part of itself, and of what the features have gained over the class frequencies:
            weak features deserve a solution too.
        max_iterations: of float32 and again of float64; stop there in any case.

    Raises:
        ProbeError: a feature is not finite, a C is not positive, or a class has no sample.
    """
    if (least := min(min(grid) for grid in grids)) <= 0:
        raise ProbeError(f"C must be positive, found {least}")
    for features_ND, labels_N in data:
        _check(features_ND, labels_N, classes)
    fits: list[Fit] = []
    widest = max(min(len(x), x.shape[1]) + 1 for x, _ in data)
    at_once = max(1, MAX_WEIGHTS // (classes * widest * max(map(len, grids))))
    for start in range(0, len(data), at_once):
        some, of_some = data[start : start + at_once], grids[start : start + at_once]
        logits = sum(len(y) * len(g) for (_, y), g in zip(some, of_some, strict=True)) * classes
        with _threads_for(logits):
            fits += _fit_together(some, classes, of_some, tolerance, max_iterations)
    return fits


def _check(features_ND: Tensor, labels_N: Tensor, classes: int) -> None:
    if not torch.isfinite(features_ND).all():
        raise ProbeError("features are not finite (NaN or infinity): expected real numbers")
    counts_C = torch.bincount(labels_N, minlength=classes)
    if len(counts_C) > classes or not counts_C.all():
        raise ProbeError(
            f"expected a sample of each of {classes} classes, found counts {counts_C.tolist()}"
        )


def _fit_together(
    data: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    grids: Sequence[Sequence[float]],
    tolerance: float,
    max_iterations: int,
) -> list[Fit]:
    means = [features_ND.double().mean(0) for features_ND, _ in data]
    axes = [_principal_axes(x.double() - mean) for (x, _), mean in zip(data, means, strict=True)]
    width = max(axes_DK.shape[1] for axes_DK in axes)
    samples: list[Sample] = []
    for (features_ND, labels_N), mean_D, axes_DK in zip(data, means, axes, strict=True):
        x_NK = (features_ND.double() - mean_D) @ axes_DK
        x_NK = F.pad(F.pad(x_NK, (1, 0), value=1.0), (0, width - axes_DK.shape[1]))
        samples.append(Sample(x_NK, labels_N))

    # scikit-learn's objective divided by C * N: the gradient's size no longer depends on either
    sizes = [len(grid) for grid in grids]
    scale = [
        torch.tensor(grid, dtype=torch.float64) * len(sample.labels_N)
        for grid, sample in zip(grids, samples, strict=True)
    ]
    ridge_PK = (1 / torch.cat(scale))[:, None].repeat(1, width + 1)
    ridge_PK[:, 0] = 0.0
    owner_P = torch.arange(len(samples)).repeat_interleave(torch.tensor(sizes))
    at_once = max(1, MAX_WEIGHTS // (classes * (width + 1)))
    solved = [
        Problems(samples, owners, ridges, classes).minimise(tolerance, max_iterations)
        for owners, ridges in zip(owner_P.split(at_once), ridge_PK.split(at_once), strict=True)
    ]
    solutions = [torch.cat(parts).split(sizes) for parts in zip(*solved, strict=True)]
    fits: list[Fit] = []
    for mean_D, axes_DK, scale_R, w_RCK, loss_R, converged_R in zip(
        means, axes, scale, *solutions, strict=True
    ):
        weight_RCD = w_RCK[..., 1 : 1 + axes_DK.shape[1]] @ axes_DK.T
        bias_RC = w_RCK[..., 0] - weight_RCD @ mean_D
        fits.append(Fit(weight_RCD, bias_RC, loss_R * scale_R, converged_R))
    return fits


@contextmanager
def _threads_for(logits: int) -> Generator[None]:
    """One thread for small problems: on a busy machine, waking others takes 30 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if logits < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _principal_axes(x_ND: Tensor) -> Tensor:
    """Orthonormal [D, min(N, D)] that spans the rows of x; x @ axes has uncorrelated columns."""
    if len(x_ND) < x_ND.shape[1]:
        span_DN = torch.linalg.qr(x_ND.T).Q
        return span_DN @ _principal_axes(x_ND @ span_DN)
    return torch.linalg.eigh(x_ND.T @ x_ND).eigenvectors
