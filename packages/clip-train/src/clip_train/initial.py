"""The model a run starts from: an architecture with random weights, or a model directory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clip_models import (
    CLIP,
    HFTokenizer,
    ModelConfig,
    Preprocess,
    Tokenizer,
    architecture,
    architecture_names,
    fingerprint_of,
    load_model,
    tokenizer_for,
)

from clip_train.config import TrainConfig
from clip_train.errors import TrainError


class Initial(NamedTuple):
    """A model in float32 on the CPU, and what feeds it."""

    model: CLIP
    preprocess: Preprocess
    tokenizer: Tokenizer | HFTokenizer


def describe_initial(model: str) -> dict[str, Any] | str:
    """What `--model` stands for, by content: a model_cfg, or the fingerprint of weights.

    Raises:
        TrainError: no such architecture, file or directory. ModelError: a broken one.
    """
    if Path(model).is_dir():
        return fingerprint_of(model)
    return _config(model).to_dict()


def build_initial(config: TrainConfig) -> Initial:
    """Random weights from --seed, initialised as open_clip does, or a model directory's.

    A Hugging Face text model starts with its own weights unless hf_model_pretrained is false.
    Towers are locked, given patch dropout and set to recompute as the configuration says.
    """
    if Path(config.model).is_dir():
        loaded = load_model(config.model)
        clip, preprocess, tokenizer = loaded.model, loaded.preprocess, loaded.tokenizer
        if config.patch_dropout is not None:
            towers = with_patch_dropout(loaded.config, config.patch_dropout)
            patched = CLIP(towers, getattr(clip.text, "hf_config", None))
            patched.load_state_dict(clip.state_dict())
            clip = patched
    else:
        towers = with_patch_dropout(_config(config.model), config.patch_dropout)
        tokenizer = tokenizer_for(towers)
        torch.manual_seed(config.seed)
        clip = CLIP(towers)
        preprocess = Preprocess(towers.vision_cfg.image_size)
    if config.lock_image is not None:
        clip.lock_image_tower(config.lock_image)
    if config.lock_text is not None:
        clip.lock_text_tower(config.lock_text)
    if config.grad_checkpointing:
        clip.set_grad_checkpointing()
    return Initial(clip.train(), preprocess, tokenizer)


def with_patch_dropout(towers: ModelConfig, share: float | None) -> ModelConfig:
    """The towers with this share of patches dropped; None: as they are."""
    if share is None:
        return towers
    return replace(towers, vision_cfg=replace(towers.vision_cfg, patch_dropout=share))


def _config(model: str) -> ModelConfig:
    if model.endswith(".json"):
        try:
            values: dict[str, Any] = json.loads(Path(model).read_text())
        except json.JSONDecodeError as error:
            raise TrainError(f"--model {model}: not JSON: {error}") from error
        # an open_clip_config.json holds the model_cfg beside other tables
        return ModelConfig.from_dict(values.get("model_cfg", values))
    if model not in architecture_names():
        raise TrainError(
            f"--model {model}: no such model directory or architecture; expected a directory, a "
            f".json file or one of {', '.join(architecture_names())}"
        )
    return architecture(model)
