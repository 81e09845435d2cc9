"""Model directories with random weights, small enough to make in a moment."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_models import CLIP, ModelConfig, Preprocess, Tokenizer, architecture, save_model
from clip_models.config import VisionConfig
from torch import Tensor

TIMM = VisionConfig(image_size=64, timm_model_name="convnext_atto", timm_pool="")
# SigLIP's kind of tower: pooled by an attention map, its own output the embedding
SIGLIP = VisionConfig(
    image_size=160, timm_model_name="test_vit3", timm_pool="map", timm_proj="none"
)


def scattered(config: ModelConfig, seed: int = 0) -> CLIP:
    """Random weights without the zeros and ones of a fresh start, which would hide a mix-up."""
    torch.manual_seed(seed)
    model = CLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def small_config(name: str) -> ModelConfig:
    """One small model of each kind that a directory may hold."""
    xs = architecture("XS")
    return {
        "vit": xs,
        "vit-quickgelu": replace(xs, quick_gelu=True),
        "vit-avg": replace(xs, vision_cfg=replace(xs.vision_cfg, pool_type="avg")),
        "vit-bias": replace(xs, custom_text=True, init_logit_bias=-10.0),
        "vit-clipa": replace(
            xs,
            vision_cfg=replace(
                xs.vision_cfg, no_ln_pre=True, final_ln_after_pool=True, pool_type="avg"
            ),
            text_cfg=replace(xs.text_cfg, no_causal_mask=True, pool_type="last"),
        ),
        "vit-eos": replace(
            xs,
            vision_cfg=replace(xs.vision_cfg, ls_init_value=1e-4),
            text_cfg=replace(xs.text_cfg, pool_type="eos", eos_id=49407, ls_init_value=0.1),
        ),
        "vit-siglip": architecture("XS-siglip"),
        "timm-siglip": replace(
            xs,
            embed_dim=96,
            custom_text=True,
            init_logit_bias=-10.0,
            vision_cfg=SIGLIP,
            text_cfg=replace(
                xs.text_cfg,
                no_causal_mask=True,
                pool_type="last",
                proj_bias=True,
                norm_kwargs={"eps": 1e-6},
                act_kwargs={"approximate": "tanh"},
            ),
        ),
        "timm": replace(xs, vision_cfg=TIMM),
        "timm-mlp": replace(xs, vision_cfg=replace(TIMM, timm_pool="avg", timm_proj="mlp")),
        "timm-own": replace(xs, vision_cfg=replace(TIMM, timm_pool="avg", timm_proj=None)),
    }[name]


KINDS = [
    "vit",
    "vit-quickgelu",
    "vit-avg",
    "vit-bias",
    "vit-clipa",
    "vit-eos",
    "vit-siglip",
    "timm-siglip",
    "timm",
    "timm-mlp",
    "timm-own",
]


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[str], Path]:
    """make_model(kind) writes a model directory and returns its path."""

    def make(kind: str) -> Path:
        path = tmp_path / kind
        config = small_config(kind)
        size = config.vision_cfg.image_size
        save_model(path, scattered(config), Preprocess(size), {"made_by": "a test"})
        return path

    return make


def inputs(config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and tokens for a model, one pair for each of CAPTIONS."""
    generator = torch.Generator().manual_seed(1)
    size = config.vision_cfg.image_size
    images = torch.randn(len(CAPTIONS), 3, size, size, generator=generator, dtype=dtype)
    return images, Tokenizer(config.text_cfg.context_length)(CAPTIONS)


CAPTIONS = ["", "a cat", "two dogs on a beach", "a very long caption " * 30, "Zürich 😀", "a cat"]
