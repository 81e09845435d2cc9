"""Towers, loss, preprocessing, tokenizer, class heads, and the model directory that holds them.

Names are imported when first used, so that `clip_models.ModelError` costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_models.architectures import architecture, architecture_names
    from clip_models.class_files import read_class_names, read_templates
    from clip_models.config import ModelConfig
    from clip_models.decode import decode_image
    from clip_models.errors import ImageError, ModelError
    from clip_models.heads import Head, build_head, list_heads, load_head, save_head
    from clip_models.hf_tokenizer import HFTokenizer
    from clip_models.loss import ContrastiveLoss, SigmoidLoss
    from clip_models.model import CLIP
    from clip_models.model_dir import (
        LoadedModel,
        load_model,
        read_model_config,
        save_model,
    )
    from clip_models.preprocess import Preprocess
    from clip_models.processes import without_shutdown
    from clip_models.profiles import profile
    from clip_models.tokenizer import Tokenizer, tokenizer_for
    from clip_models.weights import fingerprint_of

_MODULES = {
    "CLIP": "model",
    "ContrastiveLoss": "loss",
    "HFTokenizer": "hf_tokenizer",
    "Head": "heads",
    "ImageError": "errors",
    "LoadedModel": "model_dir",
    "ModelConfig": "config",
    "ModelError": "errors",
    "Preprocess": "preprocess",
    "SigmoidLoss": "loss",
    "Tokenizer": "tokenizer",
    "architecture": "architectures",
    "architecture_names": "architectures",
    "build_head": "heads",
    "decode_image": "decode",
    "fingerprint_of": "weights",
    "list_heads": "heads",
    "load_head": "heads",
    "load_model": "model_dir",
    "profile": "profiles",
    "read_class_names": "class_files",
    "read_model_config": "model_dir",
    "read_templates": "class_files",
    "save_head": "heads",
    "save_model": "model_dir",
    "tokenizer_for": "tokenizer",
    "without_shutdown": "processes",
}

__all__ = [
    "CLIP",
    "ContrastiveLoss",
    "HFTokenizer",
    "Head",
    "ImageError",
    "LoadedModel",
    "ModelConfig",
    "ModelError",
    "Preprocess",
    "SigmoidLoss",
    "Tokenizer",
    "architecture",
    "architecture_names",
    "build_head",
    "decode_image",
    "fingerprint_of",
    "list_heads",
    "load_head",
    "load_model",
    "profile",
    "read_class_names",
    "read_model_config",
    "read_templates",
    "save_head",
    "save_model",
    "tokenizer_for",
    "without_shutdown",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
