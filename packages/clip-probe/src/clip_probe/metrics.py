"""Classification metrics, defined as CLIP_benchmark defines them, with 95% intervals."""

# N samples, C classes, K best classes kept, T draws of a bootstrap, t of them at once

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAWS = 1000
DRAWN_AT_ONCE = 2**20  # images, in all draws
Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """How well one head classifies one split."""

    samples: int
    classes: int
    classes_present: int  # classes with at least one sample in the split
    acc1: float
    acc1_ci95: Interval  # Wilson score interval
    acc5: float | None  # None below five classes
    acc5_ci95: Interval | None
    mean_per_class_recall: float  # over the classes present (scikit-learn's balanced accuracy)
    mean_per_class_recall_ci95: Interval  # bootstrap within classes
    majority_class_share: float  # the chance line: accuracy of always naming the commonest class


@dataclass(frozen=True)
class MultilabelScores:
    """How well one head ranks the images of a multi-label split for each of its classes."""

    samples: int
    classes: int
    classes_present: int
    mean_average_precision: float  # CLIP_benchmark's: a class without a positive counts as 0
    mean_average_precision_ci95: Interval  # bootstrap over samples
    mean_positive_share: float  # the chance line: a random order's average precision, about


def score(best_NK: Tensor, predicted_N: Tensor, labels_N: Tensor, classes: int) -> Scores:
    """Score `Predictions` against labels: accuracies by the best classes, recall by the argmax."""
    hits_NK = best_NK == labels_N[:, None]
    counts_C = torch.bincount(labels_N, minlength=classes)
    correct_C = torch.bincount(labels_N[predicted_N == labels_N], minlength=classes)
    present_C = counts_C > 0
    samples, correct, among5 = len(labels_N), int(hits_NK[:, 0].sum()), int(hits_NK.sum())
    counts, right = counts_C[present_C].numpy(), correct_C[present_C].numpy()
    draws_TC = np.random.default_rng(0).binomial(counts, right / counts, (DRAWS, len(counts)))
    return Scores(
        samples=samples,
        classes=classes,
        classes_present=int(present_C.sum()),
        acc1=correct / samples,
        acc1_ci95=wilson_interval(correct, samples),
        acc5=among5 / samples if classes >= 5 else None,
        acc5_ci95=wilson_interval(among5, samples) if classes >= 5 else None,
        mean_per_class_recall=float(np.mean(right / counts)),
        mean_per_class_recall_ci95=interval_of((draws_TC / counts).mean(1)),
        majority_class_share=int(counts_C.max()) / samples,
    )


def score_multilabel(logits_NC: Tensor, labels_NC: Tensor) -> MultilabelScores:
    """Score logits [N, C] against labels, bool [N, C]."""
    precisions_C = average_precisions(logits_NC, labels_NC)
    draws_T = bootstrap_mean_average_precision(logits_NC.numpy(), labels_NC.numpy())
    return MultilabelScores(
        samples=len(labels_NC),
        classes=labels_NC.shape[1],
        classes_present=int(labels_NC.any(0).sum()),
        mean_average_precision=precisions_C.mean().item(),
        mean_average_precision_ci95=interval_of(draws_T),
        mean_positive_share=labels_NC.double().mean().item(),
    )


def bootstrap_mean_average_precision(
    logits_NC: NDArray[np.float32], labels_NC: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Mean average precision in draws [T] of the images; the same draws whatever the logits."""
    samples, classes = labels_NC.shape
    order_NC = np.argsort(-logits_NC, axis=0, kind="stable")
    rng, total_T = np.random.default_rng(0), np.zeros(DRAWS)
    for some_t in np.array_split(total_T, -(-DRAWS * samples // DRAWN_AT_ONCE)):  # views
        weights_tN = rng.multinomial(samples, [1 / samples] * samples, len(some_t))
        for order_N, truth_N in zip(order_NC.T, labels_NC.T, strict=True):
            seen_tN = weights_tN[:, order_N]
            hits_tN = seen_tN * truth_N[order_N]
            precision_tN = hits_tN.cumsum(1) / np.maximum(seen_tN.cumsum(1), 1)
            some_t += (hits_tN * precision_tN).sum(1) / np.maximum(hits_tN.sum(1), 1)
    return total_T / classes


def average_precisions(logits_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """Average precision of each class, float32 [C], as CLIP_benchmark and torchnet compute it."""
    ranks_N = torch.arange(1, len(labels_NC) + 1).float()
    found: list[Tensor] = []
    for logits_N, truth_N in zip(logits_NC.T, labels_NC.T, strict=True):
        hits_N = truth_N[logits_N.argsort(descending=True)]
        precision_N = hits_N.float().cumsum(0) / ranks_N
        found.append(precision_N[hits_N].sum() / hits_N.sum().clamp_min(1))
    return torch.stack(found)


def wilson_interval(correct: int, samples: int) -> Interval:
    """95% score interval of a proportion (Wilson, 1927): stays within [0, 1], also at 0 and 1."""
    z = 1.959963984540054
    share = correct / samples
    centre = share + z * z / (2 * samples)
    spread = z * sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    scale = 1 + z * z / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def interval_of(draws_T: NDArray[np.float64]) -> Interval:
    """The 95% percentile interval of a bootstrap."""
    low, high = np.percentile(draws_T, [2.5, 97.5])
    return float(low), float(high)
