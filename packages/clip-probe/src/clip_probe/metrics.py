"""Classification metrics, defined as CLIP_benchmark defines them."""

# N samples, D features, C classes, K best classes kept

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Scores:
    """How well one head classifies one split."""

    samples: int
    classes: int
    classes_present: int  # classes with at least one sample in the split
    acc1: float
    acc1_ci95: tuple[float, float]  # Wilson score interval
    acc5: float | None  # None below five classes
    mean_per_class_recall: float  # over the classes present (scikit-learn's balanced accuracy)
    majority_class_share: float  # the chance line: accuracy of always naming the commonest class


def best_classes(logits: Callable[[Tensor], Tensor], features_ND: Tensor) -> Tensor:
    """The five (or all, if fewer) best classes of each sample, best first: int64 [N, K].

    `logits` maps [n, D] to [n, C]; it is called on blocks of rows, to bound memory.
    """
    blocks = [logits(rows) for rows in features_ND.split(ROWS_AT_ONCE)]
    return torch.cat([block.topk(min(5, block.shape[1])).indices for block in blocks])


def score(best_NK: Tensor, labels_N: Tensor, classes: int) -> Scores:
    """Score the `best_classes` of each sample against its label."""
    hits_NK = best_NK == labels_N[:, None]
    counts_C = torch.bincount(labels_N, minlength=classes)
    correct_C = torch.bincount(labels_N[hits_NK[:, 0]], minlength=classes)
    present_C = counts_C > 0
    samples, correct = len(labels_N), int(correct_C.sum())
    recalls = correct_C[present_C].double() / counts_C[present_C]
    return Scores(
        samples=samples,
        classes=classes,
        classes_present=int(present_C.sum()),
        acc1=correct / samples,
        acc1_ci95=wilson_interval(correct, samples),
        acc5=int(hits_NK.sum()) / samples if classes >= 5 else None,
        mean_per_class_recall=float(recalls.mean()),
        majority_class_share=int(counts_C.max()) / samples,
    )


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson, 1927): stays within [0, 1], also at 0 and 1."""
    z = 1.959963984540054
    share = correct / samples
    centre = share + z * z / (2 * samples)
    spread = z * sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    scale = 1 + z * z / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
