"""Fine-tune CLIP models on labelled sets and interpolate their weights.

Names are imported when first used, so that `clip-finetune --help` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_finetune.config import CurveConfig, TrainConfig
    from clip_finetune.curve import measure_curve
    from clip_finetune.errors import FinetuneError
    from clip_finetune.interpolate import interpolate_models, soup_models
    from clip_finetune.labelled_set import LabelledSet, open_set
    from clip_finetune.loop import train

_MODULES = {
    "CurveConfig": "config",
    "FinetuneError": "errors",
    "LabelledSet": "labelled_set",
    "TrainConfig": "config",
    "interpolate_models": "interpolate",
    "measure_curve": "curve",
    "open_set": "labelled_set",
    "soup_models": "interpolate",
    "train": "loop",
}

__all__ = [
    "CurveConfig",
    "FinetuneError",
    "LabelledSet",
    "TrainConfig",
    "interpolate_models",
    "measure_curve",
    "open_set",
    "soup_models",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
