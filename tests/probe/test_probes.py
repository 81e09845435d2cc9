"""Draws are functions of (seed, labels); C is chosen on held-out rows only."""

import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_probe import ProbeError
from clip_probe.draws import Rows, Task, few_shot_draw, few_shot_task, full_task, held_out_fifth
from clip_probe.probes import GRID, Heads, Probe, Solver, _correct, find_probes, method_of
from clip_probe.solver import Fit, fit_grids
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

LABELS = torch.tensor(np.random.default_rng(0).integers(0, 7, 400))


def digits(first: int, last: int) -> Rows:
    data = load_digits()
    x = torch.tensor(data.data[first:last], dtype=torch.float32)
    return Rows(F.normalize(x), torch.tensor(data.target[first:last]))


def few_shot_probe(
    train: Rows, val: Rows | None, classes: int, shots: int, seed: int, solver: Solver = "lbfgs"
) -> Probe:
    task = few_shot_task(train, val, shots, seed)
    return find_probes([task], classes, method_of(solver))[0]


def full_probe(train: Rows, val: Rows | None, classes: int, solver: Solver = "lbfgs") -> Probe:
    return find_probes([full_task(train, val)], classes, method_of(solver))[0]


def test_a_draw_has_k_images_of_each_class() -> None:
    rows = few_shot_draw(LABELS, 5, seed=3)
    assert rows.shape == (7, 5)
    assert (LABELS[rows] == torch.arange(7)[:, None]).all()
    assert len(rows.unique()) == 35


def test_draws_depend_on_seed_and_labels_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = few_shot_draw(LABELS, 4, seed=0)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(few_shot_draw(LABELS, 4, seed=0), first)
    assert not torch.equal(few_shot_draw(LABELS, 4, seed=1), first)
    assert torch.equal(few_shot_draw(LABELS, 8, seed=0)[:, :4], first)  # nested
    assert first[0].tolist() == [106, 185, 136, 41]  # golden


def test_the_held_out_fifth_is_stratified() -> None:
    labels = torch.tensor([0] * 50 + [1] * 9 + [2] * 4)
    held = held_out_fifth(labels)
    assert torch.bincount(labels[held], minlength=3).tolist() == [10, 1, 0]


def test_c_has_the_best_validation_accuracy_and_is_the_smallest_such() -> None:
    train, val = digits(0, 300), digits(300, 500)
    probe = few_shot_probe(train, val, 10, 8, seed=0)
    assert probe.judged is not None
    assert len(probe.judged) == len(GRID)
    assert probe.setting == GRID[int(np.argmax(probe.judged))]
    draw = train.pick(few_shot_draw(train.labels, 8, 0).flatten())
    for c, acc1 in list(zip(GRID, probe.judged, strict=True))[::4]:
        theirs = LogisticRegression(C=c, solver="newton-cg", tol=1e-8, max_iter=1000)
        theirs.fit(draw.features.double(), draw.labels)
        assert acc1 == theirs.score(val.features.double(), val.labels)


def test_the_full_probe_is_refitted_on_train_and_validation() -> None:
    train, val = digits(0, 300), digits(300, 400)
    probe = full_probe(train, val, 10)
    assert probe.train_samples == 400
    both = train.join(val)
    theirs = LogisticRegression(C=probe.setting, solver="newton-cg", tol=1e-9, max_iter=1000)
    theirs.fit(both.features.double(), both.labels)
    logits = theirs.decision_function(both.features.double())
    ours = probe.logits(both.features).double().numpy()
    centred = ours - ours.mean(1, keepdims=True)  # a shift common to all classes is free
    assert np.abs(centred - (logits - logits.mean(1, keepdims=True))).max() < 0.01
    assert full_probe(train, None, 10).train_samples == 300


def test_few_shots_without_a_validation_split_use_no_label_beyond_the_draw() -> None:
    train = digits(0, 300)
    draw = few_shot_draw(train.labels, 6, seed=1)
    others = torch.ones(300, dtype=torch.bool)
    others[draw.flatten()] = False
    scrambled = Rows(train.features.clone(), train.labels)
    scrambled.features[others] = 0.0
    first = few_shot_probe(train, None, 10, 6, seed=1)
    second = few_shot_probe(scrambled, None, 10, 6, seed=1)
    assert first.setting == second.setting
    assert torch.equal(first.weight, second.weight)


def test_one_shot_cannot_be_divided() -> None:
    probe = few_shot_probe(digits(0, 300), None, 10, 1, seed=0)
    assert (probe.setting, probe.judged, probe.train_samples) == (1.0, None, 10)


def test_a_class_absent_from_train_is_never_predicted() -> None:
    train, test = digits(0, 300), digits(300, 600)
    without = train.pick(train.labels != 4)
    probe = full_probe(without, None, 10)
    predicted = probe.logits(test.features).argmax(1)
    assert (predicted != 4).all()
    assert probe.logits(test.features).isfinite().all()
    assert (predicted == test.labels)[test.labels != 4].double().mean() > 0.8


def test_too_few_images_to_hold_any_out() -> None:
    train = digits(0, 300)
    few = train.pick(few_shot_draw(train.labels, 4, 0).flatten())
    with pytest.raises(ProbeError, match="--val-split"):
        full_probe(few, None, 10)


@pytest.mark.parametrize("val", [False, True])
def test_many_tasks_at_once_equal_each_alone(val: bool) -> None:
    train, held = digits(0, 300), digits(300, 500) if val else None
    tasks = [few_shot_task(train, held, shots, seed) for shots in (1, 4) for seed in (0, 1)]
    method = method_of("lbfgs")
    for task, probe in zip(tasks, find_probes(tasks, 10, method), strict=True):
        (alone,) = find_probes([task], 10, method)
        assert (probe.setting, probe.judged) == (alone.setting, alone.judged)
        logits = probe.logits(train.features) - alone.logits(train.features)
        assert (logits - logits.mean(1, keepdim=True)).abs().max() < 0.02


@pytest.mark.parametrize("classes", [10, 2, 1])
def test_scikit_learn_finds_the_same_probes(classes: int) -> None:
    """Of two classes scikit-learn fits one logit, whose penalty is another; of one it fits none."""
    train, val = digits(0, 200), digits(200, 300)
    train, val = (rows.pick(rows.labels < classes) for rows in (train, val))
    ours, theirs = (
        find_probes([full_task(train, val)], classes, method_of(solver)._replace(settings=GRID[:9]))
        for solver in ("lbfgs", "sklearn")
    )
    assert ours[0].judged == theirs[0].judged
    assert ours[0].setting == theirs[0].setting
    both = [probe[0].logits(val.features) for probe in (ours, theirs)]
    centred = [logits - logits.mean(1, keepdim=True) for logits in both]
    assert torch.allclose(*centred, atol=0.02)


def test_heads_are_judged_as_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two folds at most are held, and the solver is not asked for all folds at once."""
    task = few_shot_task(digits(0, 300), None, 5, seed=0)
    (whole,) = find_probes([task], 10, method_of("lbfgs"))
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    fitted: list[int] = []

    def judged(head: Heads, rows: Rows) -> torch.Tensor:
        seen.append(weakref.ref(head[0]))
        held.append(sum(reference() is not None for reference in seen))
        return _correct(head, rows)

    def counted(data: list[Rows], *rest: Any, **options: Any) -> list[Fit]:
        fitted.append(len(data))
        return fit_grids(data, *rest, **options)

    monkeypatch.setattr("clip_probe.probes._correct", judged)
    monkeypatch.setattr("clip_probe.probes.fit_grids", counted)
    monkeypatch.setattr("clip_probe.probes.HELD", 2 * 10 * 64 * len(GRID))
    (probe,) = find_probes([task], 10, method_of("lbfgs"))
    assert max(held) <= 2
    assert fitted == [2, 2, 1, 1]
    assert (probe.setting, probe.judged) == (whole.setting, whole.judged)


def test_fits_that_stop_short_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    task = full_task(digits(0, 300), None)
    (probe,) = find_probes([task], 10, method_of("lbfgs"))
    assert probe.unfinished == []
    monkeypatch.setattr("clip_probe.probes.fit_grids", partial(fit_grids, max_iterations=2))
    (probe,) = find_probes([task], 10, method_of("lbfgs"))
    assert set(GRID[-3:]) <= set(probe.unfinished) <= set(GRID)


def test_one_fit_serves_choice_and_result_where_the_rows_are_the_same() -> None:
    """Of few shots judged by val, as of the paper's protocol."""
    train, test = digits(0, 300), digits(300, 500)
    calls: list[int] = []
    method = method_of("lbfgs")

    def watched(data: list[Rows], present: torch.Tensor, grids: list[list[float]]) -> object:
        calls.append(sum(map(len, grids)))
        return method.fit(data, present, grids)

    find_probes([Task([(train, test)], train)], 10, method._replace(fit=watched))  # type: ignore[arg-type]
    assert calls == [len(GRID)]
