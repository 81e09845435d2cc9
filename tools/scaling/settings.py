"""What a fit is made with. The options of `fit` are generated from these fields."""

from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, text: str, **option: Any) -> Any:
    return field(default=default, metadata={"help": text, **option})


@dataclass(frozen=True)
class Settings:
    """How points are chosen, and how much is resampled; see each field's help."""

    metric: tuple[str, ...] = _setting(
        (),
        "What to fit: a dataset, a metric or TASK/DATASET/METRIC; in a wide table a column. "
        "Can be given again; without it, everything in the table.",
        multiple=True,
    )
    by: str = _setting(
        "group", "A law for each value of this column.", choices=("group", "data", "model", "none")
    )
    points: str = _setting(
        "pareto",
        "Which runs carry the law: the best of equal bins of log compute (the paper's rule), "
        "those that no cheaper run beats, or all.",
        choices=("binned", "pareto", "all"),
    )
    bins: int = _setting(5, "Bins of the rule `binned`.", least=3)
    edge: float = _setting(0.1, "Decades that `binned` adds above the largest run.", least=0)
    bootstrap: int = _setting(2000, "Resamplings of the runs; 0: no intervals.", least=0)
    seed: int = _setting(0, "Seed of the resampling.", least=0)
    saturating: bool = _setting(
        False, "Also fit E = E0 + a C^b, and say whether E0 can be told from zero."
    )
    holdout_largest: int = _setting(
        0,
        "Predict each group's K largest runs from a fit of the others.",
        least=0,
        metavar="K",
    )
