"""A model directory to a directory that transformers' CLIPModel and CLIPProcessor load."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clip_models.config import ModelConfig, PreprocessConfig
from clip_models.convert_names import clip_names, to_theirs
from clip_models.convert_processor import write_processor, write_tokenizer
from clip_models.errors import ModelError
from clip_models.model_dir import load_model, new_directory, refuse_existing
from clip_models.tokenizer import END, START, VOCAB_SIZE


def export_transformers(
    model_dir: str | os.PathLike[str], output: str | os.PathLike[str]
) -> dict[str, Any]:
    """Write a model directory as transformers' CLIPModel, with its tokenizer and image processor.

    transformers' tokenizer neither repairs mojibake nor unescapes HTML, as ours does first.

    Args:
        model_dir: a model directory with native towers.
        output: must not exist.

    Returns:
        model, format, parameters, fingerprint (of the model directory's weights).

    Raises:
        ModelError: the directory does not load, or is of a model that CLIPModel cannot be.
    """
    refuse_existing(output)
    loaded = load_model(model_dir)
    config, preprocess = loaded.config, loaded.preprocess.config
    if found := _inexpressible(config, preprocess):
        raise ModelError(f"{model_dir}: transformers' CLIPModel has no {found}")
    layers = config.vision_cfg.layers
    assert isinstance(layers, int)  # no ResNet
    names = clip_names(layers, config.text_cfg.layers)
    weights = to_theirs(loaded.model.state_dict(), names)
    with new_directory(output) as temporary:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        write_processor(temporary, config.vision_cfg.image_size, preprocess)
        write_tokenizer(temporary, config.text_cfg.context_length)
        text = json.dumps(_clip_config(config), indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
    return {
        "model": str(Path(output)),
        "format": "transformers CLIPModel",
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "fingerprint": loaded.fingerprint,
    }


def _inexpressible(config: ModelConfig, preprocess: PreprocessConfig) -> str | None:
    """The first part of a model that CLIPModel lacks."""
    vision, text = config.vision_cfg, config.text_cfg
    lacks = {
        f"timm tower ({vision.timm_model_name})": vision.timm_model_name is not None,
        "ResNet tower": isinstance(vision.layers, tuple),
        f"Hugging Face text tower ({text.hf_model_name})": text.hf_model_name is not None,
        f"tokenizer but CLIP's ({text.hf_tokenizer_name})": text.hf_tokenizer_name is not None,
        f"vocabulary of {text.vocab_size}": text.vocab_size < VOCAB_SIZE,
        f"{vision.pool_type} pooling of images": vision.pool_type != "tok",
        f"{text.pool_type} pooling of texts": _eos(config) is None,
        "attention without causal mask": text.no_causal_mask,
        "layer scale": vision.ls_init_value is not None or text.ls_init_value is not None,
        "image tower without its first norm": vision.no_ln_pre,
        "bias or lack of a text projection": text.proj_bias or text.proj_type != "linear",
        "logit bias": config.init_logit_bias is not None,
        f"resize mode {preprocess.resize_mode}": preprocess.resize_mode == "longest",
    }
    return next((name for name, is_so in lacks.items() if is_so), None)


def _eos(config: ModelConfig) -> int | None:
    """The token that a CLIPModel pools at; it takes 2 for "the highest id"."""
    text = config.text_cfg
    if text.pool_type == "argmax":
        return END
    return text.eos_id if text.pool_type == "eos" and text.eos_id != 2 else None


def _clip_config(config: ModelConfig) -> dict[str, Any]:
    vision, text = config.vision_cfg, config.text_cfg
    act = "quick_gelu" if config.quick_gelu else "gelu"
    tanh = (text.act_kwargs or {}).get("approximate") == "tanh"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": config.embed_dim,
            "hidden_act": act,
            "layer_norm_eps": 1e-5,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": START,
            "eos_token_id": _eos(config),
            "pad_token_id": END,
            "projection_dim": config.embed_dim,
            "hidden_act": "gelu_pytorch_tanh" if tanh else act,
            "layer_norm_eps": (text.norm_kwargs or {}).get("eps", 1e-5),
        },
    }
