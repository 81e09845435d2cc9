"""How far confidence can be trusted: the expected calibration error and its bins."""

# N samples, B bins

from dataclasses import dataclass

from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width over (0, 1]."""

    ece: float  # mean of |accuracy - confidence| over the bins, weighted by their samples
    samples_B: list[int]
    confidence_B: list[float]  # mean of the bin; 0 where it is empty
    accuracy_B: list[float]


def calibrate(confidence_N: Tensor, correct_N: Tensor, bins: int = BINS) -> Calibration:
    """The expected calibration error (Guo et al., 1706.04599, Eq. 3) of top-1 confidences."""
    number_N = (confidence_N.double() * bins).ceil().long().clamp(1, bins) - 1
    samples_B = number_N.bincount(minlength=bins)
    some_B = samples_B.clamp_min(1)
    confidence_B = number_N.bincount(confidence_N.double(), minlength=bins) / some_B
    accuracy_B = number_N.bincount(correct_N.double(), minlength=bins) / some_B
    gap_B = (accuracy_B - confidence_B).abs() * samples_B
    return Calibration(
        ece=float(gap_B.sum() / samples_B.sum()),
        samples_B=samples_B.tolist(),
        confidence_B=confidence_B.tolist(),
        accuracy_B=accuracy_B.tolist(),
    )
