"""The named architectures: the paper's, open_clip's smaller ones, and some for laptops."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_models.config import ModelConfig, TextConfig, VisionConfig
from clip_models.errors import ModelError


def _vit(
    embed: int,
    image: tuple[int, int, int, int],
    text: tuple[int, int, int] = (512, 8, 12),
    **vision: Any,
) -> ModelConfig:
    """From (width, layers, patch, pixels) and (width, heads, layers)."""
    width, layers, patch, size = image
    return ModelConfig(
        embed_dim=embed,
        vision_cfg=VisionConfig(
            image_size=size, layers=layers, width=width, patch_size=patch, **vision
        ),
        text_cfg=TextConfig(width=text[0], heads=text[1], layers=text[2]),
    )


_BASE: dict[str, ModelConfig] = {
    # for tests and laptops: the tower at 64 pixels, two text layers
    "XS": _vit(64, (64, 2, 16, 64), (64, 2, 2), head_width=32),
    "Ti": _vit(192, (192, 6, 8, 64), (192, 6, 6), head_width=32),
    "ViT-S-32": _vit(384, (384, 12, 32, 224), (384, 6, 12)),
    "ViT-S-16": _vit(384, (384, 12, 16, 224), (384, 6, 12)),
    "ViT-B-32": _vit(512, (768, 12, 32, 224)),
    "ViT-B-16": _vit(512, (768, 12, 16, 224)),
    "ViT-L-14": _vit(768, (1024, 24, 14, 224), (768, 12, 12)),
    "ViT-L-14-336": _vit(768, (1024, 24, 14, 336), (768, 12, 12)),
    "ViT-H-14": _vit(1024, (1280, 32, 14, 224), (1024, 16, 24), head_width=80),
    "ViT-g-14": _vit(1024, (1408, 40, 14, 224), (1024, 16, 24), head_width=88, mlp_ratio=4.3637),
    "ViT-bigG-14": _vit(
        1280, (1664, 48, 14, 224), (1280, 20, 32), head_width=104, mlp_ratio=4.9231
    ),
}


_QUICKGELU, _SIGLIP = "-quickgelu", "-siglip"


def architecture_names() -> list[str]:
    """The names that `architecture` knows, small models first."""
    quick = [name + _QUICKGELU for name in _BASE if name.startswith("ViT-")]
    return [*_BASE, *quick, *(name + _SIGLIP for name in _BASE)]


def architecture(name: str) -> ModelConfig:
    """The configuration of a named architecture, or of a JSON file with open_clip's model_cfg.

    `NAME-quickgelu` is NAME with OpenAI's activation. `NAME-siglip` is NAME for the sigmoid loss:
    a logit bias, and both scalars started as in SigLIP (2303.15343, section 3.2).

    Raises:
        ModelError: no such name or file, or a file that does not describe a model.
    """
    if name.endswith(".json"):
        try:
            return ModelConfig.from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{name}: {error}") from error
    if name not in architecture_names():
        raise ModelError(
            f"no architecture {name!r}; known: {', '.join(architecture_names())}, "
            "or a .json file with open_clip's model_cfg"
        )
    if name.endswith(_SIGLIP):
        base = _BASE[name.removesuffix(_SIGLIP)]
        return replace(base, custom_text=True, init_logit_scale=math.log(10), init_logit_bias=-10.0)
    return replace(_BASE[name.removesuffix(_QUICKGELU)], quick_gelu=name.endswith(_QUICKGELU))
