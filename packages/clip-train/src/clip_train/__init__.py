"""Train CLIP models from WebDataset shards under Accelerate: `train(TrainConfig(...))`."""

from typing import TYPE_CHECKING, Any

from clip_train.config import TrainConfig
from clip_train.errors import TrainError

if TYPE_CHECKING:
    from clip_train.loop import Summary, train

__all__ = ["Summary", "TrainConfig", "TrainError", "train"]


def __getattr__(name: str) -> Any:
    if name in ("Summary", "train"):  # these import torch
        from clip_train import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'clip_train' has no attribute {name!r}")
