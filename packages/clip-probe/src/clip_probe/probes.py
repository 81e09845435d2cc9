"""Linear probes on frozen features: the best setting of a grid, found for many tasks together.

How a setting is chosen, never on a test split unless the paper's protocol is asked for:
- Full data: by accuracy on the validation split, or, without one, on a fifth of train (stratified,
  seed 0). The probe is then fitted again on train and validation together.
- k shots: by accuracy on the validation split, which is used for nothing else. Without one, by
  cross-validation within the draw (min(k, 5) folds), so that no further label is used; one shot
  cannot be divided, so there it is the solver's `blind` setting.
- Among equals the first of the grid: the smallest C, the simplest probe.
"""

# N samples, D features, C classes, G settings, P classes present

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_probe.adam import AdamSetting, fit_adam
from clip_probe.draws import Rows, Task
from clip_probe.solver import fit_grids

Solver = Literal["lbfgs", "sklearn", "adam"]
Heads = tuple[Tensor, Tensor]  # weight [G, C, D] and bias [G, C], float32
GRID = tuple(10 ** (half / 2) for half in range(-4, 13))  # C from 0.01 to 1e6
RATES, EPOCHS = (0.1, 0.01, 0.001), (10, 20, 40)
DECAYS = (0.0, 0.001, 0.01, 0.1, 1.0)
NEVER = -1e30  # bias of a class without training images: below every other logit, and finite

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """A solver with its grid."""

    settings: Sequence[Any]  # C, or AdamSetting
    blind: Any  # the setting where nothing can choose one
    fit: Callable[[Sequence[Rows], Tensor, Sequence[Sequence[Any]]], list[Heads]]
    # of (rows with labels 0 … P - 1, the classes that these are [P], a grid for each of the rows)

    def describe(self, setting: Any) -> dict[str, float]:
        """A setting as results tell it."""
        return setting._asdict() if isinstance(setting, AdamSetting) else {"c": setting}


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier and how its setting was chosen."""

    weight: Tensor  # [C, D] float32
    bias: Tensor  # [C] float32
    setting: Any
    judged: list[float] | None  # accuracy of each setting; None where nothing could judge
    train_samples: int

    def logits(self, features_ND: Tensor) -> Tensor:
        """Features of any length [N, D] -> [N, C], as a class head defines it."""
        return F.linear(F.normalize(features_ND, dim=-1), self.weight, self.bias)


def method_of(solver: Solver, *, paper: bool = False, start: Heads | None = None) -> Method:
    """The solver with its grid; `start`: weight [C, D] and bias [C] for AdamW to start from.

    `paper` is the paper's grid (section 4.3): Adam, no weight decay.
    """
    if solver == "lbfgs":
        return Method(GRID, 1.0, _fit_lbfgs)
    if solver == "sklearn":
        return Method(GRID, 1.0, _fit_sklearn)
    decays = (0.0,) if paper else DECAYS
    settings = [AdamSetting(lr, e, decay) for decay in decays for lr in RATES for e in EPOCHS]

    def fit(data: Sequence[Rows], present_P: Tensor, grids: Sequence[Sequence[Any]]) -> list[Heads]:
        first = (start[0][present_P], start[1][present_P]) if start else None
        return [
            fit_adam(rows.features, rows.labels, len(present_P), grid, start=first)
            for rows, grid in zip(data, grids, strict=True)
        ]

    return Method(settings, AdamSetting(0.01, 20), fit)


def find_probes(tasks: Sequence[Task], classes: int, method: Method) -> list[Probe]:
    """The probe of each task; all tasks' fits are one call of the solver.

    The rows to fit must have the same classes in all tasks.
    """
    folds = [fitted for task in tasks for fitted, _ in task.folds]
    heads = iter(_fit(folds, classes, [method.settings] * len(folds), method))
    choices = [_choose(task, [next(heads) for _ in task.folds], method) for task in tasks]
    later = [i for i, choice in enumerate(choices) if choice.head is None]
    finals = [tasks[i].final for i in later]
    for i, head in zip(
        later, _fit(finals, classes, [[choices[i].setting] for i in later], method), strict=True
    ):
        choices[i] = choices[i]._replace(head=(head[0][0], head[1][0]))
    return [
        Probe(*choice.head, choice.setting, choice.judged, len(task.final.labels))
        for task, choice in zip(tasks, choices, strict=True)
        if choice.head
    ]


class _Choice(NamedTuple):
    setting: Any
    judged: list[float] | None
    head: Heads | None  # weight [C, D], bias [C], where the final rows were fitted already


def _choose(task: Task, heads: list[Heads], method: Method) -> _Choice:
    if not heads:
        return _Choice(method.blind, None, None)
    pairs = zip(heads, task.folds, strict=True)
    correct_G = torch.stack([_correct(head, held) for head, (_, held) in pairs]).sum(0)
    judged = (correct_G.double() / sum(len(held.labels) for _, held in task.folds)).tolist()
    best = int(correct_G.argmax())  # the first of equals
    fitted = task.folds[0][0] is task.final
    head = (heads[0][0][best], heads[0][1][best]) if fitted else None
    return _Choice(method.settings[best], judged, head)


def _correct(head: Heads, rows: Rows) -> Tensor:
    """How many rows each setting's head classifies rightly [G]."""
    return torch.stack(
        [
            (F.linear(rows.features, weight_CD, bias_C).argmax(1) == rows.labels).sum()
            for weight_CD, bias_C in zip(*head, strict=True)
        ]
    )


def _fit(
    data: Sequence[Rows], classes: int, grids: Sequence[Sequence[Any]], method: Method
) -> list[Heads]:
    """Fit among the classes present; a class without images is never predicted."""
    if not data:
        return []
    present_P = data[0].labels.unique()
    compact = [Rows(x, torch.searchsorted(present_P, labels)) for x, labels in data]
    found: list[Heads] = []
    for weight_GPD, bias_GP in method.fit(compact, present_P, grids):
        weight_GCD = torch.zeros(len(weight_GPD), classes, weight_GPD.shape[2])
        bias_GC = torch.full((len(weight_GPD), classes), NEVER)
        weight_GCD[:, present_P], bias_GC[:, present_P] = weight_GPD, bias_GP
        found.append((weight_GCD, bias_GC))
    return found


def _fit_lbfgs(
    data: Sequence[Rows], present_P: Tensor, grids: Sequence[Sequence[float]]
) -> list[Heads]:
    found: list[Heads] = []
    for fit, grid in zip(fit_grids(data, len(present_P), grids), grids, strict=True):
        if not fit.converged.all():
            unfinished = [c for c, ok in zip(grid, fit.converged.tolist(), strict=True) if not ok]
            logger.warning("the probes with C = %s stopped short of the optimum", unfinished)
        found.append((fit.weight.float(), fit.bias.float()))
    return found


def _fit_sklearn(
    data: Sequence[Rows], present_P: Tensor, grids: Sequence[Sequence[float]]
) -> list[Heads]:
    """scikit-learn's LogisticRegression, one fit after another: the reference."""
    found: list[Heads] = []
    for rows, grid in zip(data, grids, strict=True):
        fits = [_sklearn(rows, len(present_P), c) for c in grid]
        found.append((torch.stack([w for w, _ in fits]), torch.stack([b for _, b in fits])))
    return found


def _sklearn(rows: Rows, classes: int, c: float) -> Heads:
    from sklearn.linear_model import LogisticRegression

    if classes == 1:  # which it refuses
        return torch.zeros(1, rows.features.shape[1]), torch.zeros(1)
    # of two classes it fits the difference alone, whose square is twice the sum of both squares
    scale = 2 if classes == 2 else 1
    model = LogisticRegression(C=c * scale, tol=1e-6, max_iter=10_000)
    model.fit(rows.features.double().numpy(), rows.labels.numpy())
    weight_CD, bias_C = torch.tensor(model.coef_).float(), torch.tensor(model.intercept_).float()
    if classes == 2:
        return torch.cat([-weight_CD, weight_CD]) / 2, torch.cat([-bias_C, bias_C]) / 2
    return weight_CD, bias_C
