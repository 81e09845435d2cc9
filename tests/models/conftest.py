"""Model directories with random weights, small enough to make in a moment."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_models import CLIP, ModelConfig, Preprocess, architecture, save_model
from clip_models.config import VisionConfig

TIMM = VisionConfig(image_size=64, timm_model_name="convnext_atto", timm_pool="")


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
        "timm": replace(xs, vision_cfg=TIMM),
        "timm-mlp": replace(xs, vision_cfg=replace(TIMM, timm_pool="avg", timm_proj="mlp")),
        "timm-own": replace(xs, vision_cfg=replace(TIMM, timm_pool="avg", timm_proj=None)),
    }[name]


KINDS = ["vit", "vit-quickgelu", "vit-avg", "vit-bias", "timm", "timm-mlp", "timm-own"]


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[str], Path]:
    """make_model(kind) writes a model directory and returns its path."""

    def make(kind: str) -> Path:
        path = tmp_path / kind
        save_model(path, scattered(small_config(kind)), Preprocess(64), {"made_by": "a test"})
        return path

    return make


CAPTIONS = ["", "a cat", "two dogs on a beach", "a very long caption " * 30, "Zürich 😀", "a cat"]
