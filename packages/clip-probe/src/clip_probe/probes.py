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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_probe.adam import AdamSetting, fit_adam
from clip_probe.draws import Rows, Task
from clip_probe.solver import TOLERANCE, fit_grids

Solver = Literal["lbfgs", "sklearn", "adam"]
Heads = tuple[Tensor, Tensor]  # weight [G, C, D] and bias [G, C], float32
Fitted = tuple[Heads, list[Any]]  # and the settings whose fit stopped short of the optimum
GRID = tuple(10 ** (half / 2) for half in range(-4, 13))  # C from 0.01 to 1e6
RATES, EPOCHS = (0.1, 0.01, 0.001), (10, 20, 40)
DECAYS = (0.0, 0.001, 0.01, 0.1, 1.0)
HELD = 2**26  # weights that fits may have in float64 at once: 512 MB
NEVER = -1e30  # bias of a class without training images: below every other logit, and finite

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """A solver with its grid."""

    settings: Sequence[Any]  # C, or AdamSetting
    blind: Any  # the setting where nothing can choose one
    fit: Callable[[Sequence[Rows], Tensor, Sequence[Sequence[Any]]], Iterator[Fitted]]
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
    unfinished: list[Any]  # settings of which some fit stopped short of the optimum

    def logits(self, features_ND: Tensor) -> Tensor:
        """Features of any length [N, D] -> [N, C], as a class head defines it."""
        return F.linear(F.normalize(features_ND, dim=-1), self.weight, self.bias)


def method_of(
    solver: Solver,
    *,
    tolerance: float = TOLERANCE,
    paper: bool = False,
    start: Heads | None = None,
) -> Method:
    """The solver with its grid; `start`: weight [C, D] and bias [C] for AdamW to start from.

    `tolerance` is that of `fit_grids`. `paper` is the paper's grid (section 4.3): Adam, no weight
    decay.
    """
    if solver == "lbfgs":
        return Method(GRID, 1.0, partial(_fit_lbfgs, tolerance))
    if solver == "sklearn":
        return Method(GRID, 1.0, _fit_sklearn)
    decays = (0.0,) if paper else DECAYS
    settings = [AdamSetting(lr, e, decay) for decay in decays for lr in RATES for e in EPOCHS]

    def fit(
        data: Sequence[Rows], present_P: Tensor, grids: Sequence[Sequence[Any]]
    ) -> Iterator[Fitted]:
        first = (start[0][present_P], start[1][present_P]) if start else None
        for rows, grid in zip(data, grids, strict=True):
            yield fit_adam(rows.features, rows.labels, len(present_P), grid, start=first), []

    return Method(settings, AdamSetting(0.01, 20), fit)


def find_probes(
    tasks: Sequence[Task], classes: int, method: Method, device: torch.device | str = "cpu"
) -> list[Probe]:
    """The probe of each task; the solver takes all tasks' fits together, on `device`.

    The rows to fit must have the same classes in all tasks. Each fold's heads are judged as they
    arrive, so that those of two folds are held at a time, and what the solver holds (`HELD`).
    """
    folds = [fitted for task in tasks for fitted, _ in task.folds]
    fits = _fit(folds, classes, [method.settings] * len(folds), method, device)
    choices = [_choose(task, fits, method) for task in tasks]
    later = [i for i, choice in enumerate(choices) if choice.head is None]
    finals = [tasks[i].final for i in later]
    fits = _fit(finals, classes, [[choices[i].setting] for i in later], method, device)
    for i, (head, unfinished) in zip(later, fits, strict=True):
        choices[i].unfinished.update(unfinished)
        choices[i] = choices[i]._replace(head=(head[0][0], head[1][0]))
    return [
        Probe(
            *choice.head,
            choice.setting,
            choice.judged,
            len(task.final.labels),
            sorted(choice.unfinished),
        )
        for task, choice in zip(tasks, choices, strict=True)
        if choice.head
    ]


class _Choice(NamedTuple):
    setting: Any
    judged: list[float] | None
    head: Heads | None  # weight [C, D], bias [C], where the final rows were fitted already
    unfinished: set[Any]


def _choose(task: Task, fits: Iterator[Fitted], method: Method) -> _Choice:
    """Judge the settings by the task's folds, whose fits come next."""
    unfinished: set[Any] = set()
    correct_G, final = torch.zeros(len(method.settings), dtype=torch.int64), None
    for fitted, held in task.folds:
        head, short = next(fits)
        unfinished.update(short)
        correct_G += _correct(head, held)
        final = head if fitted is task.final else None
    if not task.folds:
        return _Choice(method.blind, None, None, unfinished)
    judged = (correct_G.double() / sum(len(held.labels) for _, held in task.folds)).tolist()
    best = int(correct_G.argmax())  # the first of equals
    # copies, so that the other settings' weights are not kept
    chosen = (final[0][best].clone(), final[1][best].clone()) if final else None
    return _Choice(method.settings[best], judged, chosen, unfinished)


def _correct(head: Heads, rows: Rows) -> Tensor:
    """How many rows each setting's head classifies rightly [G]."""
    return torch.stack(
        [
            (F.linear(rows.features, weight_CD, bias_C).argmax(1) == rows.labels).sum()
            for weight_CD, bias_C in zip(*head, strict=True)
        ]
    )


def _fit(
    data: Sequence[Rows],
    classes: int,
    grids: Sequence[Sequence[Any]],
    method: Method,
    device: torch.device | str,
) -> Iterator[Fitted]:
    """Fit among the classes present; a class without images is never predicted."""
    if not data:
        return
    present_P = data[0].labels.unique()
    compact = [
        Rows(x.to(device), torch.searchsorted(present_P, labels).to(device)) for x, labels in data
    ]
    for (weight_GPD, bias_GP), unfinished in method.fit(compact, present_P, grids):
        weight_GCD = torch.zeros(len(weight_GPD), classes, weight_GPD.shape[2])
        bias_GC = torch.full((len(weight_GPD), classes), NEVER)
        weight_GCD[:, present_P], bias_GC[:, present_P] = weight_GPD.cpu(), bias_GP.cpu()
        yield (weight_GCD, bias_GC), unfinished


def _fit_lbfgs(
    tolerance: float, data: Sequence[Rows], present_P: Tensor, grids: Sequence[Sequence[float]]
) -> Iterator[Fitted]:
    weights = len(present_P) * data[0].features.shape[1] * max(map(len, grids))
    at_once = max(1, HELD // weights)
    for start in range(0, len(data), at_once):
        some = slice(start, start + at_once)
        fits = fit_grids(data[some], len(present_P), grids[some], tolerance=tolerance)
        for fit, grid in zip(fits, grids[some], strict=True):
            unfinished = [c for c, ok in zip(grid, fit.converged.tolist(), strict=True) if not ok]
            if unfinished:
                logger.warning("the probes with C = %s stopped short of the optimum", unfinished)
            yield (fit.weight.float(), fit.bias.float()), unfinished


def _fit_sklearn(
    data: Sequence[Rows], present_P: Tensor, grids: Sequence[Sequence[float]]
) -> Iterator[Fitted]:
    """scikit-learn's LogisticRegression, one fit after another: the reference."""
    for rows, grid in zip(data, grids, strict=True):
        fits = [_sklearn(rows, len(present_P), c) for c in grid]
        yield (torch.stack([w for w, _ in fits]), torch.stack([b for _, b in fits])), []


def _sklearn(rows: Rows, classes: int, c: float) -> Heads:
    from sklearn.linear_model import LogisticRegression

    if classes == 1:  # which it refuses
        return torch.zeros(1, rows.features.shape[1]), torch.zeros(1)
    # of two classes it fits the difference alone, whose square is twice the sum of both squares
    scale = 2 if classes == 2 else 1
    model = LogisticRegression(C=c * scale, tol=1e-6, max_iter=10_000)
    model.fit(rows.features.double().cpu().numpy(), rows.labels.cpu().numpy())
    weight_CD, bias_C = torch.tensor(model.coef_).float(), torch.tensor(model.intercept_).float()
    if classes == 2:
        return torch.cat([-weight_CD, weight_CD]) / 2, torch.cat([-bias_C, bias_C]) / 2
    return weight_CD, bias_C
