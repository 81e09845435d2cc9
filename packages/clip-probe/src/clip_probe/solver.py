"""L2-regularised multinomial logistic regression: a grid of regularisations in one L-BFGS run.

The objective is scikit-learn's, for every C of the grid, with the intercept b unregularised:

    C * sum_n CE(W x_n + b, y_n) + 0.5 ||W||^2

Three things make it quick without changing the optimum:

- Features are centred (the intercept absorbs the mean) and rotated to their principal axes, which
  leaves ||W|| as it is. Where N < D this drops the D - N directions without data: W is zero there.
- In those axes the Hessian is nearly diagonal, so a diagonal preconditioner copes with
  ill-conditioned features.
- Logits are linear in the step, so the line search touches no features: an iteration makes one pass
  over them for the step and one for the gradient, each shared by all C.
"""

# N samples, D features, K rotated features and a constant, C classes, R regularisations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_probe.errors import ProbeError

HISTORY = 10
MAX_LOGITS = 2**24  # fitted at once: 128 MB an array, about eight arrays
SMALL = 2**20  # logits; below, one thread


@dataclass(frozen=True)
class Fit:
    """The optimum for each C of the grid, in the coordinates of the features given; float64."""

    weight: Tensor  # [R, C, D]
    bias: Tensor  # [R, C]
    objective: Tensor  # [R] scikit-learn's, at the solution
    converged: Tensor  # [R] bool: False where max_iterations came first


def fit_grid(
    features_ND: Tensor,
    labels_N: Tensor,
    classes: int,
    grid: Sequence[float],
    *,
    tolerance: float = 1e-9,
    max_iterations: int = 3000,
) -> Fit:
    """Fit one logistic regression per C in `grid`, all over the same data, in float64.

    Args:
        features_ND: any floating type.
        labels_N: int64, each of 0 … classes - 1 at least once (an intercept without a sample has no
            optimum).
        classes: C.
        grid: the values of C, scikit-learn's inverse regularisation.
        tolerance: stop where the objective is estimated (by half the Newton decrement) to be above
            its optimum by no more than this part of itself, and of what the features have gained
            over the class frequencies: weak features deserve a solution too.
        max_iterations: stop there in any case.

    Raises:
        ProbeError: a feature is not finite, a C is not positive, or a class has no sample.
    """
    if not torch.isfinite(features_ND).all():
        raise ProbeError("features are not finite (NaN or infinity): expected real numbers")
    if min(grid) <= 0:
        raise ProbeError(f"C must be positive, found {min(grid)}")
    counts_C = torch.bincount(labels_N, minlength=classes)
    if len(counts_C) > classes or not counts_C.all():
        raise ProbeError(
            f"expected a sample of each of {classes} classes, found counts {counts_C.tolist()}"
        )

    x_ND = features_ND.double()
    mean_D = x_ND.mean(0)
    axes_DK = _principal_axes(x_ND - mean_D)
    x_NK = torch.cat([(x_ND - mean_D) @ axes_DK, torch.ones_like(x_ND[:, :1])], dim=1)

    # scikit-learn's objective divided by C * N: the gradient's size no longer depends on either
    scale_R = x_NK.new_tensor(grid) * len(x_NK)
    at_once = max(1, MAX_LOGITS // (len(x_NK) * classes))
    with _threads_for(len(x_NK) * classes * min(at_once, len(grid))):
        solved = [
            _minimise(x_NK, labels_N, classes, penalty, tolerance, max_iterations)
            for penalty in (1 / scale_R).split(at_once)
        ]
    solution_RCK, loss_R, converged_R = (torch.cat(parts) for parts in zip(*solved, strict=True))

    weight_RCD = solution_RCK[..., :-1] @ axes_DK.T
    bias_RC = solution_RCK[..., -1] - weight_RCD @ mean_D
    return Fit(weight_RCD, bias_RC, loss_R * scale_R, converged_R)


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


def _minimise(
    x_NK: Tensor,
    labels_N: Tensor,
    classes: int,
    penalty_R: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise mean CE + 0.5 penalty ||W||^2 -> (solution [R, C, K], loss [R], converged [R])."""
    samples, width = x_NK.shape
    target_NC = F.one_hot(labels_N, classes).to(x_NK)
    pull_CK = target_NC.T @ x_NK / samples  # the gradient's constant part
    curvature_K = x_NK.square().mean(0)
    penalised_K = torch.ones_like(curvature_K)
    penalised_K[-1] = 0.0

    # start at the class frequencies, the best that an intercept can do
    frequency_C = target_NC.mean(0)
    start_loss = -frequency_C @ frequency_C.log()
    solution = x_NK.new_zeros(len(penalty_R), classes, width)
    solution[..., -1] = frequency_C.log()
    final_loss = start_loss.repeat(len(penalty_R))
    done = torch.zeros_like(penalty_R, dtype=torch.bool)

    # the problems still running: a finished one leaves all of these
    live = torch.arange(len(penalty_R), device=x_NK.device)
    ridge_R1K = penalty_R[:, None, None] * penalised_K
    w_RCK = solution.clone()
    z_NRC = w_RCK[..., -1].repeat(samples, 1, 1)
    pairs: list[tuple[Tensor, Tensor]] = []  # steps and changes of gradient
    w_before = grad_before = w_RCK

    for iteration in range(max_iterations):
        log_p_NRC = z_NRC.log_softmax(-1)
        entropy_R = -log_p_NRC[torch.arange(samples), :, labels_N].mean(0)
        loss_R = entropy_R + 0.5 * _dot(ridge_R1K * w_RCK, w_RCK)
        p_NRC = log_p_NRC.exp()
        slopes_RCK = (p_NRC.flatten(1).T @ x_NK).view_as(w_RCK) / samples - pull_CK
        grad_RCK = slopes_RCK + ridge_R1K * w_RCK
        if iteration > 0:
            pairs = [*pairs[1 - HISTORY :], (w_RCK - w_before, grad_RCK - grad_before)]

        # the diagonal of each class's own block of the Hessian, in these axes
        spread_RC = (p_NRC * (1 - p_NRC)).mean(0).clamp_min(1e-12)
        hessian_RCK = spread_RC[..., None] * curvature_K + ridge_R1K
        step_RCK = -_two_loop(grad_RCK, pairs, 1 / hessian_RCK)
        slope_R = _dot(grad_RCK, step_RCK)

        gain_R = (start_loss - loss_R).clamp(1e-6 * loss_R, loss_R)
        finished_R = -0.5 * slope_R <= tolerance * gain_R
        solution[live], final_loss[live], done[live] = w_RCK, loss_R, finished_R
        if finished_R.all():
            break
        if finished_R.any():
            on = ~finished_R
            live, ridge_R1K, slope_R = live[on], ridge_R1K[on], slope_R[on]
            w_RCK, grad_RCK, step_RCK = w_RCK[on], grad_RCK[on], step_RCK[on]
            z_NRC, pairs = z_NRC[:, on], [(s[on], y[on]) for s, y in pairs]

        dz_NRC = (x_NK @ step_RCK.flatten(0, 1).T).view_as(z_NRC)
        linear_R = _dot(ridge_R1K * w_RCK - pull_CK, step_RCK)
        quadratic_R = _dot(ridge_R1K * step_RCK, step_RCK)
        t_R = _line_search(z_NRC, dz_NRC, linear_R, quadratic_R, slope_R)
        w_before, grad_before = w_RCK, grad_RCK
        w_RCK = w_RCK + t_R[:, None, None] * step_RCK
        z_NRC = z_NRC + t_R[:, None] * dz_NRC
    return solution, final_loss, done


def _dot(a_RCK: Tensor, b_RCK: Tensor) -> Tensor:
    """The inner product of each problem: [R]."""
    return (a_RCK * b_RCK).sum((1, 2))


def _two_loop(grad_RCK: Tensor, pairs: list[tuple[Tensor, Tensor]], inverse_RCK: Tensor) -> Tensor:
    """Inverse Hessian times gradient, for each problem (Nocedal & Wright, Algorithm 7.4)."""
    q = grad_RCK
    scales = [(1 / _dot(s, y))[:, None, None] for s, y in pairs]
    alphas: list[Tensor] = []
    for (s, y), scale in zip(reversed(pairs), reversed(scales), strict=True):
        alphas.append(scale * _dot(s, q)[:, None, None])
        q = q - alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        inverse_RCK = inverse_RCK * (_dot(s, y) / _dot(y, inverse_RCK * y))[:, None, None]
    r = inverse_RCK * q
    for (s, y), scale, alpha in zip(pairs, scales, reversed(alphas), strict=True):
        r = r + (alpha - scale * _dot(y, r)[:, None, None]) * s
    return r


def _line_search(
    z_NRC: Tensor, dz_NRC: Tensor, linear_R: Tensor, quadratic_R: Tensor, slope_R: Tensor
) -> Tensor:
    """Minimise the convex loss along the step by bracketed Newton, to a tenth of the first slope.

    d loss / dt = mean_n p_n(t) . dz_n + linear + t * quadratic
    """
    t_R = torch.ones_like(slope_R)
    low_R, high_R = torch.zeros_like(t_R), torch.full_like(t_R, torch.inf)
    for _ in range(30):
        p_NRC = (z_NRC + t_R[:, None] * dz_NRC).softmax(-1)
        mean_NR = (p_NRC * dz_NRC).sum(-1)
        first_R = mean_NR.mean(0) + linear_R + t_R * quadratic_R
        second_R = ((p_NRC * dz_NRC.square()).sum(-1) - mean_NR.square()).mean(0) + quadratic_R
        searching_R = first_R.abs() > 0.1 * slope_R.abs()
        if not searching_R.any():
            break
        low_R = torch.where(first_R < 0, t_R, low_R)
        high_R = torch.where(first_R > 0, t_R, high_R)
        newton_R = t_R - first_R / second_R
        inside_R = (newton_R > low_R) & (newton_R < high_R)
        middle_R = torch.where(high_R.isinf(), 2 * t_R, (low_R + high_R) / 2)
        t_R = torch.where(
            searching_R, torch.where(inside_R, newton_R.clamp_max(10 * t_R), middle_R), t_R
        )
    return t_R
