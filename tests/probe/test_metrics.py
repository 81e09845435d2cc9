"""Metrics equal scikit-learn's and scipy's."""

import warnings

import numpy as np
import pytest
import torch
from clip_probe.metrics import best_classes, score, wilson_interval
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score


@pytest.mark.parametrize("classes", [2, 4, 5, 17])
def test_scores_equal_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 300)
    logits = rng.normal(size=(300, classes)) + 2 * np.eye(classes)[labels]
    best = best_classes(lambda rows: rows, torch.tensor(logits))
    scores = score(best, torch.tensor(labels), classes)
    assert scores.acc1 == accuracy_score(labels, logits.argmax(1))
    assert scores.mean_per_class_recall == pytest.approx(
        balanced_accuracy_score(labels, logits.argmax(1)), abs=1e-15
    )
    if classes > 5:
        assert scores.acc5 == top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    else:
        assert scores.acc5 == (1.0 if classes == 5 else None)


def test_a_class_absent_from_the_split_counts_in_no_recall() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 1, 2])
    scores = score(predicted[:, None], labels, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(labels, predicted)
    assert scores.mean_per_class_recall == expected == (2 / 3 + 1) / 2
    assert (scores.classes, scores.classes_present, scores.acc1) == (3, 2, 3 / 4)
    assert scores.majority_class_share == 3 / 4


def test_best_classes_in_blocks_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    whole = best_classes(lambda rows: rows, logits)
    monkeypatch.setattr("clip_probe.metrics.ROWS_AT_ONCE", 3)
    assert torch.equal(best_classes(lambda rows: rows, logits), whole)


@pytest.mark.parametrize(("correct", "samples"), [(0, 9), (9, 9), (1, 2), (586, 1000)])
def test_wilson_interval_equals_scipy(correct: int, samples: int) -> None:
    expected = binomtest(correct, samples).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, samples) == pytest.approx(tuple(expected), abs=1e-12)
