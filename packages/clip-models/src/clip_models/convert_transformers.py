"""Directories of transformers' CLIPModel and SiglipModel, read as JSON and tensors.

A CLIPModel becomes native towers. A SiglipModel becomes timm's SigLIP tower and a native text tower
without causal mask, as open_clip's own SigLIP models are.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clip_models.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig
from clip_models.convert_files import (
    TRANSFORMERS_WEIGHTS,
    Source,
    find_weights,
    read_json,
    read_weights,
)
from clip_models.convert_names import clip_names, siglip_names, split_pooling, to_ours
from clip_models.convert_processor import has_clip_tokenizer, read_processor
from clip_models.errors import ModelError

_log = logging.getLogger(__name__)

# What a configuration leaves out has these values.
_TOWER = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "eos_token_id": 49407,
}
_VISION = {**_TOWER, "num_channels": 3, "image_size": 224, "vision_use_head": True}
_CLIP_TEXT = {
    "num_attention_heads": 8,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_SIGLIP_TEXT = {"vocab_size": 32000, "max_position_embeddings": 64}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision": {**_VISION, **_CLIP, "patch_size": 32},
        "text": {**_TOWER, **_CLIP, **_CLIP_TEXT},
    },
    "siglip": {
        "vision": {**_VISION, **_SIGLIP, "patch_size": 16},
        "text": {**_TOWER, **_SIGLIP, **_SIGLIP_TEXT},
    },
}
_TANH = ("gelu_pytorch_tanh", "gelu_new")


def read_transformers(directory: Path, name: str) -> Source:
    """A model directory of transformers.

    Args:
        directory: with config.json, weights, and where there are any preprocessor and tokenizer.
        name: what the model's tokenizer is called in the configuration, where it is not CLIP's.

    Raises:
        ModelError: another kind of model, or one with parts that open_clip's layout cannot say.
    """
    values = read_json(directory / "config.json")
    kind = str(values.get("model_type"))
    if kind not in _DEFAULTS:
        raise ModelError(
            f"{directory / 'config.json'}: model_type {kind!r}; of transformers' models only "
            "CLIPModel ('clip') and SiglipModel ('siglip') convert"
        )
    files = find_weights(directory, TRANSFORMERS_WEIGHTS)
    found = read_weights(files)[1]
    try:
        vision, text = (
            # old files have both tables, and transformers then reads the first
            defaults | (values.get(f"{tower}_config_dict") or values.get(f"{tower}_config") or {})
            for tower, defaults in _DEFAULTS[kind].items()
        )
        if kind == "clip":
            config, preprocess = _clip_config(values, vision, text), PreprocessConfig()
            names = clip_names(vision["num_hidden_layers"], text["num_hidden_layers"])
        else:
            config = _siglip_config(vision, text)
            half = (0.5, 0.5, 0.5)
            preprocess = PreprocessConfig(half, half, resize_mode="squash")
            names = siglip_names(vision["num_hidden_layers"], text["num_hidden_layers"])
            split_pooling(found)
        preprocess = read_processor(directory, config.vision_cfg.image_size, preprocess)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{directory}: config.json or the processor's has a value of the wrong kind ({error})"
        ) from error
    own_tokenizer = kind == "siglip" or not has_clip_tokenizer(directory)
    if own_tokenizer:
        kwargs = {"clean": "canonicalize"} if kind == "siglip" else None
        text_cfg = replace(config.text_cfg, hf_tokenizer_name=name, tokenizer_kwargs=kwargs)
        config = replace(config, text_cfg=text_cfg)
    return Source(
        format="transformers CLIPModel" if kind == "clip" else "transformers SiglipModel",
        config=config,
        weights=to_ours(found, names, files[0]),
        preprocess=preprocess,
        files=files,
        home=directory,
    )


def _clip_config(
    values: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]
) -> ModelConfig:
    act = vision["hidden_act"]
    quick = act == "quick_gelu"
    if act not in ("gelu", "quick_gelu") or quick != (text["hidden_act"] == "quick_gelu"):
        raise ModelError(
            f"open_clip's layout has no model with hidden_act {act!r} for images and "
            f"{text['hidden_act']!r} for texts"
        )
    if vision["layer_norm_eps"] != 1e-5:
        raise ModelError(f"layer_norm_eps {vision['layer_norm_eps']} of the image tower, not 1e-5")
    eos = text["eos_token_id"]
    # 2 is a mistake of old configurations, which transformers reads as "the highest id"
    pooling = {} if eos in (2, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": eos}
    return ModelConfig(
        embed_dim=values.get("projection_dim", 512),
        vision_cfg=VisionConfig(
            image_size=_square(vision, "image_size"),
            layers=vision["num_hidden_layers"],
            width=vision["hidden_size"],
            head_width=vision["hidden_size"] // vision["num_attention_heads"],
            mlp_ratio=_mlp_ratio(vision),
            patch_size=_square(vision, "patch_size"),
        ),
        text_cfg=_text_config(text, **pooling),
        quick_gelu=quick,
    )


def _siglip_config(vision: dict[str, Any], text: dict[str, Any]) -> ModelConfig:
    if not vision["vision_use_head"] or vision["layer_norm_eps"] != 1e-6:
        raise ModelError("the image tower has no pooling head, or a layer_norm_eps other than 1e-6")
    embed_dim = text.get("projection_size") or text["hidden_size"]
    if embed_dim != vision["hidden_size"]:
        raise ModelError(
            f"texts embed in {embed_dim} dimensions, images in {vision['hidden_size']}"
        )
    return ModelConfig(
        embed_dim=embed_dim,
        vision_cfg=VisionConfig(
            image_size=_square(vision, "image_size"),
            timm_model_name=_timm_name(vision),
            timm_pool="map",
            timm_proj="none",
        ),
        text_cfg=_text_config(text, no_causal_mask=True, pool_type="last", proj_bias=True),
        custom_text=True,
        init_logit_bias=-10,
    )


def _text_config(text: dict[str, Any], **more: Any) -> TextConfig:
    if text["hidden_act"] not in ("gelu", "quick_gelu", *_TANH):
        raise ModelError(f"hidden_act {text['hidden_act']!r} of the text tower")
    eps = text["layer_norm_eps"]
    return TextConfig(
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        layers=text["num_hidden_layers"],
        mlp_ratio=_mlp_ratio(text),
        act_kwargs={"approximate": "tanh"} if text["hidden_act"] in _TANH else None,
        norm_kwargs=None if eps == 1e-5 else {"eps": eps},
        **more,
    )


def _mlp_ratio(tower: dict[str, Any]) -> float:
    """A ratio from which int(width * ratio) gives the hidden width back."""
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _square(vision: dict[str, Any], name: str) -> int:
    if not isinstance(vision[name], int) or vision["num_channels"] != 3:
        raise ModelError(
            f"{name} {vision[name]!r}, {vision['num_channels']} channels; want squares, 3"
        )
    return vision[name]


def _timm_name(vision: dict[str, Any]) -> str:
    """timm's model of this size. Its activation is its own, which is said where it differs."""
    import timm  # takes seconds

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    pattern = f"vit_*_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    for name in timm.list_models(pattern):
        with torch.device("meta"):
            tower: Any = timm.create_model(name)
        block = tower.blocks[0]
        size = (
            tower.embed_dim,
            len(tower.blocks),
            block.attn.num_heads,
            block.mlp.fc1.out_features,
        )
        if size != tuple(vision[n] for n in names):
            continue
        x = torch.linspace(-3, 3, 100)
        theirs = F.gelu(x, approximate="tanh" if vision["hidden_act"] in _TANH else "none")
        if not torch.allclose(block.mlp.act(x), theirs, atol=1e-6):
            _log.warning(
                "timm's %s has another GELU than %s: image features differ by about 1e-3, as those "
                "of open_clip's own SigLIP models do",
                name,
                vision["hidden_act"],
            )
        return name
    size = ", ".join(f"{n} {vision[n]}" for n in names)
    raise ModelError(f"timm {timm.__version__} has no model {pattern} with {size}")
