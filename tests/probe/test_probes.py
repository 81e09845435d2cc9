"""Draws are functions of (seed, labels); C is chosen on held-out rows only."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_probe import ProbeError
from clip_probe.probes import (
    GRID,
    ONE_SHOT_C,
    Rows,
    few_shot_draw,
    few_shot_probe,
    full_probe,
    held_out_fifth,
)
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

LABELS = torch.tensor(np.random.default_rng(0).integers(0, 7, 400))


def digits(first: int, last: int) -> Rows:
    data = load_digits()
    x = torch.tensor(data.data[first:last], dtype=torch.float32)
    return Rows(F.normalize(x), torch.tensor(data.target[first:last]))


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
    assert probe.val_acc1 is not None
    assert len(probe.val_acc1) == len(GRID)
    assert probe.c == GRID[int(np.argmax(probe.val_acc1))]
    draw = train.pick(few_shot_draw(train.labels, 8, 0).flatten())
    for c, acc1 in list(zip(GRID, probe.val_acc1, strict=True))[::4]:
        theirs = LogisticRegression(C=c, solver="newton-cg", tol=1e-8, max_iter=1000)
        theirs.fit(draw.features.double(), draw.labels)
        assert acc1 == theirs.score(val.features.double(), val.labels)


def test_the_full_probe_is_refitted_on_train_and_validation() -> None:
    train, val = digits(0, 300), digits(300, 400)
    probe = full_probe(train, val, 10)
    assert probe.train_samples == 400
    both = train.join(val)
    theirs = LogisticRegression(C=probe.c, solver="newton-cg", tol=1e-9, max_iter=1000)
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
    assert first.c == second.c
    assert torch.equal(first.weight, second.weight)


def test_one_shot_cannot_be_divided() -> None:
    probe = few_shot_probe(digits(0, 300), None, 10, 1, seed=0)
    assert (probe.c, probe.val_acc1, probe.train_samples) == (ONE_SHOT_C, None, 10)


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
