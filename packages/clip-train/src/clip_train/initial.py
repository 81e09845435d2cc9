"""The model a run starts from: an architecture with random weights, or a model directory."""

import json
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


def build_initial(model: str, seed: int) -> Initial:
    """Random weights from `seed`, initialised as open_clip does, or a model directory's.

    A Hugging Face text model starts with its own weights unless hf_model_pretrained is false.
    """
    if Path(model).is_dir():
        loaded = load_model(model)
        clip, preprocess, tokenizer = loaded.model, loaded.preprocess, loaded.tokenizer
    else:
        config = _config(model)
        tokenizer = tokenizer_for(config)
        torch.manual_seed(seed)
        clip = CLIP(config)
        preprocess = Preprocess(config.vision_cfg.image_size)
    return Initial(clip, preprocess, tokenizer)


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
