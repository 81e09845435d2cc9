"""Many softmax regressions minimised together by L-BFGS, in float32 first and then in float64.

Problem p has the rows of sample p's owner (a draw, a fold; a grid of penalties shares one) and its
own ridge. It minimises

    mean_n CE(w_p x_n, y_n) + 0.5 sum(ridge_p w_p^2)

What makes it quick:

- The problems of a sample are the columns of one matrix: a pass over its features serves them all.
  Rows come in blocks, so that logits are made, turned into probabilities and used in cache.
- The features' axes are uncorrelated (solver.py), so the Hessian is nearly diagonal and its
  diagonal a good first guess for L-BFGS. It costs nothing beside the gradient.
- float32 until its rounding is what is left of the gradient, then float64 with the same history.
- A finished problem leaves the passes.

Features, weights and what has their shape are on the samples' device; a number a problem ([P] and
[L]), by which all decisions are taken, is on the CPU.
"""

# S samples, N rows of one, B rows of a block, K features, C classes, V = C * K weights, P problems,
# L of them live, M pairs of L-BFGS's history

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

HISTORY = 10
LOGITS_AT_ONCE = 2**19  # 2 MB in float32: a block stays in a core's cache
GPU_LOGITS_AT_ONCE = 2**26  # enough for all of a GPU to work on
LEAST_LOG_P = -40.0  # keeps squares of probabilities out of the slow subnormal range


class Sample(NamedTuple):
    """Rows that one or more problems are fitted on; column 0 of the features is the constant 1."""

    x_NK: Tensor
    labels_N: Tensor

    def to(self, dtype: torch.dtype) -> "Sample":
        return Sample(self.x_NK.to(dtype), self.labels_N)


class Minimum(NamedTuple):
    """Where each problem ended; float64."""

    w_PCK: Tensor
    loss_P: Tensor
    converged_P: Tensor


@dataclass
class _State:
    """Every problem's place, derivatives there, step length to try, and L-BFGS pairs."""

    w_PCK: Tensor
    grad_PCK: Tensor
    inverse_PCK: Tensor  # of the Hessian's diagonal
    loss_P: Tensor
    length_P: Tensor
    s_PMCK: Tensor  # steps
    y_PMCK: Tensor  # and changes of gradient
    curvature_PM: Tensor  # s . y, infinite where there is no pair
    decrement_MP: Tensor  # half the Newton decrement at the last M places, the latest included
    pairs_P: Tensor  # how many there were; the next goes to slot pairs % M

    def cast(self, dtype: torch.dtype) -> None:
        """Change the type of all but losses, lengths and counts."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("CK"):
                setattr(self, field.name, value.to(dtype))


class Problems:
    """Softmax regressions of C classes over K features, whose samples they share."""

    def __init__(
        self, samples: Sequence[Sample], owner_P: Tensor, ridge_PK: Tensor, classes: int
    ) -> None:
        """`owner_P` says whose rows each problem has, in ascending order."""
        self.samples = samples
        self.owner_P = owner_P
        self.device = samples[0].x_NK.device
        self.ridge_P1K = ridge_PK[:, None].double().to(self.device)
        counts = [torch.bincount(s.labels_N, minlength=classes) / len(s.labels_N) for s in samples]
        self.frequency_SC = torch.stack(counts).double().cpu()
        self.square_SK = torch.stack([s.x_NK.double().square().mean(0) for s in samples])
        # at the class frequencies, the best that an intercept can do
        self.start_loss_P = -(self.frequency_SC * self.frequency_SC.log()).sum(1)[owner_P]

    def minimise(self, tolerance: float, max_iterations: int) -> Minimum:
        """Start at the class frequencies; stop as `fit_grid` says."""
        problems, classes = len(self.owner_P), self.frequency_SC.shape[1]
        width = self.square_SK.shape[1]
        w_PCK = torch.zeros(problems, classes, width, dtype=torch.float64, device=self.device)
        w_PCK[..., 0] = self.frequency_SC[self.owner_P].log().to(self.device)
        history = w_PCK.new_zeros(problems, HISTORY, classes, width, dtype=torch.float32)
        state = _State(
            w_PCK,
            w_PCK,
            w_PCK,
            self.start_loss_P,
            torch.ones(problems, dtype=torch.float64),
            history,
            history.clone(),
            torch.full((problems, HISTORY), torch.inf, dtype=torch.float64),
            torch.zeros(HISTORY, problems, dtype=torch.float64),
            torch.zeros(problems, dtype=torch.int64),
        )
        converged_P = self.start_loss_P < 0  # none
        for dtype in (torch.float32, torch.float64):
            state.cast(dtype)
            samples = [sample.to(dtype) for sample in self.samples]
            converged_P = self._descend(samples, state, tolerance, max_iterations)
        return Minimum(state.w_PCK, state.loss_P, converged_P)

    def _descend(
        self, samples: Sequence[Sample], state: _State, tolerance: float, max_iterations: int
    ) -> Tensor:
        """Move the state to the minimum, as far as its type allows; whether it is there [P]."""
        epsilon = torch.finfo(state.w_PCK.dtype).eps
        live_L = torch.arange(len(self.owner_P))
        converged_P = torch.zeros(len(live_L), dtype=torch.bool)
        state.loss_P, state.grad_PCK, state.inverse_PCK = self._derivatives(
            samples, live_L, state.w_PCK
        )
        state.length_P = torch.ones_like(state.length_P)
        for _ in range(max_iterations):
            grad_LCK, inverse_LCK = state.grad_PCK[live_L], state.inverse_PCK[live_L]
            directions = zip(live_L.tolist(), grad_LCK, inverse_LCK, strict=True)
            step_LCK = torch.stack([_direction(state, *of) for of in directions])
            slope_L, loss_L = _dot(grad_LCK, step_LCK), state.loss_P[live_L]
            state.decrement_MP[state.pairs_P[live_L] % HISTORY, live_L] = -0.5 * slope_L
            left_L = _gap(state, live_L)
            gain_L = (self.start_loss_P[live_L] - loss_L).clamp(1e-6 * loss_L, loss_L)
            reached_L = left_L <= tolerance * gain_L
            converged_P[live_L] = reached_L
            # gains so small that no longer fall, and steps so short, are rounding
            # (far below the type's own: errors of the rows cancel, and a gradient's are squared)
            stalled_L = left_L.isinf() & (-0.5 * slope_L <= 0.1 * epsilon * gain_L)
            ended_L = reached_L | stalled_L | (state.length_P[live_L] < 1e-3)
            if ended_L.all():
                break
            if ended_L.any():
                live_L, step_LCK, slope_L = live_L[~ended_L], step_LCK[~ended_L], slope_L[~ended_L]
            self._try(samples, state, live_L, step_LCK, slope_L, epsilon)
        return converged_P

    def _try(
        self,
        samples: Sequence[Sample],
        state: _State,
        live_L: Tensor,
        step_LCK: Tensor,
        slope_L: Tensor,
        epsilon: float,
    ) -> None:
        """Take each live problem's step where it is good, and shorten the next try where not.

        The loss is convex, so its slopes at both ends tell enough, and more exactly than losses do.
        """
        length_L, loss_L = state.length_P[live_L], state.loss_P[live_L]
        step_LCK.mul_(length_L[:, None, None].to(self.device))
        trial_LCK = state.w_PCK[live_L] + step_LCK
        trial_loss_L, grad_LCK, inverse_LCK = self._derivatives(samples, live_L, trial_LCK)
        before_L, after_L = slope_L * length_L, _dot(grad_LCK, step_LCK)
        good_L = (after_L <= -0.5 * before_L) & (trial_loss_L <= loss_L * (1 + 10 * epsilon))
        shorter_L = (before_L / (before_L - after_L)).clamp(0.1, 0.5)
        state.length_P[live_L] = torch.where(good_L, 1.0, length_L * shorter_L)

        moved = live_L[good_L]
        step_LCK, grad_LCK, inverse_LCK = step_LCK[good_L], grad_LCK[good_L], inverse_LCK[good_L]
        change_LCK = grad_LCK - state.grad_PCK[moved]
        curvature_L = _dot(step_LCK, change_LCK)
        slot_L = state.pairs_P[moved] % HISTORY
        state.s_PMCK[moved, slot_L], state.y_PMCK[moved, slot_L] = step_LCK, change_LCK
        state.curvature_PM[moved, slot_L] = torch.where(curvature_L > 0, curvature_L, torch.inf)
        state.pairs_P[moved] += 1
        state.w_PCK[moved], state.loss_P[moved] = trial_LCK[good_L], trial_loss_L[good_L]
        state.grad_PCK[moved], state.inverse_PCK[moved] = grad_LCK, inverse_LCK

    def _derivatives(
        self, samples: Sequence[Sample], live_L: Tensor, w_LCK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [L] float64, gradient [L, C, K], inverse of the Hessian's diagonal [L, C, K]."""
        owner_L = self.owner_P[live_L]
        parts = w_LCK.split(owner_L.bincount(minlength=len(samples)).tolist())
        found = [_cross_entropy(*pair) for pair in zip(samples, parts, strict=True)]
        entropy_L, grad_LCK, spread_LC = (torch.cat(part) for part in zip(*found, strict=True))
        ridge_L1K = self.ridge_P1K[live_L].to(w_LCK.dtype)
        loss_L = entropy_L + 0.5 * _dot(ridge_L1K * w_LCK, w_LCK)
        grad_LCK.addcmul_(ridge_L1K, w_LCK)
        square_L1K = self.square_SK[owner_L][:, None].to(w_LCK.dtype)
        hessian_LCK = spread_LC.clamp_min(1e-12)[..., None] * square_L1K + ridge_L1K
        return loss_L, grad_LCK, hessian_LCK.clamp_min_(1e-30).reciprocal_()


def _cross_entropy(sample: Sample, w_PCK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy [P] float64, its gradient [P, C, K] and mean of p (1 - p) [P, C].

    All from the residuals p - y. That of the right class is minus the sum of the others, not p - 1,
    which would leave nothing of a residual of 1e-7 in float32.
    """
    (samples, width), (problems, classes, _) = sample.x_NK.shape, w_PCK.shape
    entropy_P = w_PCK.new_zeros(problems, dtype=torch.float64)
    grad_QK = w_PCK.new_zeros(problems * classes, width)
    spread_PC = w_PCK.new_zeros(problems, classes)
    if not problems:
        return entropy_P.cpu(), grad_QK.view_as(w_PCK), spread_PC
    at_once = LOGITS_AT_ONCE if w_PCK.device.type == "cpu" else GPU_LOGITS_AT_ONCE
    rows = max(64, at_once // (problems * classes))
    w_KQ = w_PCK.view(-1, width).T
    for x_BK, labels_B in zip(sample.x_NK.split(rows), sample.labels_N.split(rows), strict=True):
        right = torch.arange(len(labels_B), device=labels_B.device), slice(None), labels_B
        r_BPC = (x_BK @ w_KQ).view(-1, problems, classes).log_softmax(-1)
        log_p_BP = r_BPC[right]
        r_BPC.clamp_min_(LEAST_LOG_P).exp_()
        r_BPC[right] = 0.0
        wrong_BP = r_BPC.sum(-1)
        r_BPC[right] = -wrong_BP
        surprise_BP = torch.where(wrong_BP < 0.5, -torch.log1p(-wrong_BP), -log_p_BP)
        entropy_P += surprise_BP.sum(0, dtype=torch.float64)
        grad_QK.addmm_(r_BPC.flatten(1).T, x_BK)
        spread_PC += r_BPC.abs().sub_(r_BPC.square_()).sum(0)
    return entropy_P.cpu() / samples, (grad_QK / samples).view_as(w_PCK), spread_PC / samples


def _gap(state: _State, live_L: Tensor) -> Tensor:
    """How far each problem's loss is above its minimum [L], from the course of its decrements.

    A step gains about the decrement at its start. Should the gains of the last steps, beside those
    of as many before, go on to fall as they fell, the rest is a geometric series.
    """
    pairs_L, ages_M1 = state.pairs_P[live_L], torch.arange(HISTORY)[:, None]
    decrement_ML = state.decrement_MP[(pairs_L - ages_M1) % HISTORY, live_L]
    half_L = ((pairs_L + 1) // 2).clamp_max(HISTORY // 2)
    latest_L = (decrement_ML * (ages_M1 < half_L)).sum(0)
    before_L = (decrement_ML * ((ages_M1 >= half_L) & (ages_M1 < 2 * half_L))).sum(0)
    rest_L = latest_L * latest_L / (before_L - latest_L)
    rest_L = torch.where(latest_L < before_L, rest_L, torch.inf)
    return torch.where(pairs_L == 0, decrement_ML[0], rest_L.maximum(decrement_ML[0]))


def _dot(a_PCK: Tensor, b_PCK: Tensor) -> Tensor:
    """The inner product of each problem: [P] float64."""
    pairs = zip(a_PCK.flatten(1), b_PCK.flatten(1), strict=True)
    # one by one: a batched product of vectors takes several times as long
    return torch.tensor([a.dot(b).item() for a, b in pairs], dtype=torch.float64)


def _direction(state: _State, problem: int, grad_CK: Tensor, inverse_CK: Tensor) -> Tensor:
    """Minus the inverse Hessian times one problem's gradient (Nocedal & Wright, Algorithm 7.4).

    Problem by problem: a history then stays in cache, and none is copied for those that are live.
    """
    s_MV, y_MV = state.s_PMCK[problem].flatten(1), state.y_PMCK[problem].flatten(1)
    curvatures = state.curvature_PM[problem].tolist()
    pairs = int(state.pairs_P[problem])
    slots = [(pairs - age) % HISTORY for age in range(1, min(pairs, HISTORY) + 1)]
    q_V, inverse_V = grad_CK.flatten().clone(), inverse_CK.flatten()
    alphas: list[float] = []
    for slot in slots:
        alphas.append(s_MV[slot].dot(q_V).item() / curvatures[slot])
        q_V.sub_(y_MV[slot], alpha=alphas[-1])
    r_V = q_V.mul_(inverse_V)
    if slots and math.isfinite(latest := curvatures[slots[0]]):
        y_V = y_MV[slots[0]]
        r_V.mul_(latest / max(y_V.dot(inverse_V * y_V).item(), 1e-30))
    for slot, alpha in zip(reversed(slots), reversed(alphas), strict=True):
        beta = y_MV[slot].dot(r_V).item() / curvatures[slot]
        r_V.add_(s_MV[slot], alpha=alpha - beta)
    return r_V.neg_().view_as(grad_CK)
