"""Metrics equal CLIP_benchmark's, scikit-learn's and scipy's."""

import tracemalloc
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from clip_probe.calibration import calibrate
from clip_probe.metrics import (
    average_precisions,
    bootstrap_mean_average_precision,
    score,
    score_multilabel,
    wilson_interval,
)
from clip_probe.predictions import predict
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    top_k_accuracy_score,
)


@pytest.mark.parametrize("classes", [2, 4, 5, 17])
def test_scores_equal_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 300)
    logits = rng.normal(size=(300, classes)) + 2 * np.eye(classes)[labels]
    said = predict(lambda rows: rows, torch.tensor(logits))
    scores = score(said.best_NK, said.predicted_N, torch.tensor(labels), classes)
    assert scores.acc1 == accuracy_score(labels, logits.argmax(1))
    assert scores.mean_per_class_recall == balanced_accuracy_score(labels, logits.argmax(1))
    low, high = scores.mean_per_class_recall_ci95
    assert low < scores.mean_per_class_recall < high
    if classes > 5:
        assert scores.acc5 == top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    else:
        assert scores.acc5 == (1.0 if classes == 5 else None)


def test_classes_of_equal_logits_are_scored_as_clip_benchmark_does() -> None:
    """As of ImageNet's names given twice: accuracy by topk, recall by argmax."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (300, 17), generator=generator).float()
    labels = torch.randint(17, (300,), generator=generator)
    said = predict(lambda rows: rows, logits)
    scores = score(said.best_NK, said.predicted_N, labels, 17)
    first = logits.topk(5).indices[:, 0]
    assert not torch.equal(first, logits.argmax(1))
    assert scores.acc1 == accuracy_score(labels, first)
    assert scores.mean_per_class_recall == balanced_accuracy_score(labels, logits.argmax(1))


def test_a_class_absent_from_the_split_counts_in_no_recall() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 1, 2])
    scores = score(predicted[:, None], predicted, labels, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(labels, predicted)
    assert scores.mean_per_class_recall == expected == (2 / 3 + 1) / 2
    assert (scores.classes, scores.classes_present, scores.acc1) == (3, 2, 3 / 4)
    assert scores.majority_class_share == 3 / 4


def test_predictions_in_blocks_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    whole = predict(lambda rows: rows, logits, multilabel=True)
    monkeypatch.setattr("clip_probe.predictions.ROWS_AT_ONCE", 3)
    blocks = predict(lambda rows: rows, logits, multilabel=True)
    for name, tensor in vars(whole).items():
        assert torch.equal(getattr(blocks, name), tensor), name


@pytest.mark.parametrize(("correct", "samples"), [(0, 9), (9, 9), (1, 2), (586, 1000)])
def test_wilson_interval_equals_scipy(correct: int, samples: int) -> None:
    expected = binomtest(correct, samples).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, samples) == pytest.approx(tuple(expected), abs=1e-12)


def test_recall_interval_is_the_bootstrap_within_classes() -> None:
    """30 of 40 and 2 of 10 are right: the standard error of the mean is known."""
    labels = torch.tensor([0] * 40 + [1] * 10)
    predicted = torch.tensor([0] * 30 + [1] * 10 + [1] * 2 + [0] * 8)
    low, high = score(predicted[:, None], predicted, labels, 2).mean_per_class_recall_ci95
    error = np.sqrt(0.75 * 0.25 / 40 + 0.2 * 0.8 / 10) / 2
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    assert (low + high) / 2 == pytest.approx((0.75 + 0.2) / 2, abs=0.02)


def benchmark_average_precisions(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """CLIP_benchmark's definition (metrics/zeroshot_classification.py)."""
    ap = torch.zeros(scores.size(1))
    rg = torch.arange(1, scores.size(0) + 1).float()
    for k in range(scores.size(1)):
        _, sortind = torch.sort(scores[:, k], 0, True)
        truth = targets[:, k][sortind]
        precision = truth.float().cumsum(0).div(rg)
        ap[k] = precision[truth.bool()].sum() / max(float(truth.sum()), 1)
    return ap


def many_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(300, 7, generator=generator) < torch.linspace(0, 0.8, 7)
    return torch.randn(300, 7, generator=generator) + labels, labels


def test_mean_average_precision_equals_clip_benchmark() -> None:
    logits, labels = many_labels()
    scores = score_multilabel(logits, labels)
    expected = benchmark_average_precisions(logits, labels.int())
    assert scores.mean_average_precision == expected.mean().item()
    assert torch.equal(average_precisions(logits, labels), expected)
    theirs = average_precision_score(labels[:, 1:].numpy(), logits[:, 1:].numpy(), average=None)
    assert np.allclose(expected[1:], theirs, atol=1e-6)
    assert (scores.classes, scores.classes_present) == (7, 6)
    low, high = scores.mean_average_precision_ci95
    assert low < scores.mean_average_precision < high


def test_bootstrap_of_average_precision_repeats_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw is the average precision of the images drawn, as scikit-learn weights them."""
    monkeypatch.setattr("clip_probe.metrics.DRAWS", 5)
    logits, labels = (x[:, 3:].numpy() for x in many_labels())
    draws = bootstrap_mean_average_precision(logits, labels)
    weights = np.random.default_rng(0).multinomial(300, [1 / 300] * 300, 5)
    for draw, weight in zip(draws, weights, strict=True):
        assert draw == pytest.approx(average_precision_score(labels, logits, sample_weight=weight))


def test_bootstrap_holds_some_draws_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the draws are the same, however many."""
    logits, labels = (x[:, 3:].numpy() for x in many_labels())
    whole = bootstrap_mean_average_precision(logits, labels)
    monkeypatch.setattr("clip_probe.metrics.DRAWN_AT_ONCE", 7 * 300)
    tracemalloc.start()
    assert np.array_equal(bootstrap_mean_average_precision(logits, labels), whole)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # all 1,000 draws of 300 images at once are 2.4 MB an array


def test_calibration_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 500).astype(np.float32)
    confidence[:3] = (1.0, 1 / 15, 0.0)  # the edges
    correct = rng.uniform(size=500) < confidence**2
    result = calibrate(torch.tensor(confidence), torch.tensor(correct))
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in pairwise(edges):
        bin_ = (confidence > low) & (confidence <= high) | (confidence == 0) & (low == 0)
        if bin_.any():
            ece += bin_.mean() * abs(correct[bin_].mean() - confidence[bin_].mean())
    assert result.ece == pytest.approx(ece, abs=1e-7)
    assert sum(result.samples_B) == 500
    share, mean = calibration_curve(correct, confidence, n_bins=15)
    filled = [n for n, samples in enumerate(result.samples_B) if samples]
    assert [result.accuracy_B[n] for n in filled] == pytest.approx(share.tolist(), abs=0.03)
    assert [result.confidence_B[n] for n in filled] == pytest.approx(mean.tolist(), abs=0.03)
