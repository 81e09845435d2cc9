"""The same model for another image size or context length: position embeddings interpolated."""

# N patches + 1, G patches along a side, L context length, W width

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_models.errors import ModelError
from clip_models.image_tower import TimmTower, VisionTransformer
from clip_models.model import CLIP
from clip_models.model_dir import fingerprint_of, load_model, save_model
from clip_models.preprocess import Preprocess
from clip_models.text_tower import TextTransformer


def resize(
    model: CLIP, *, image_size: int | None = None, context_length: int | None = None
) -> CLIP:
    """A copy of a model that takes other images or longer captions; fine-tune it to profit.

    Image positions are interpolated bicubically on their grid, text positions linearly, as in
    open_clip. A convolutional timm tower has no positions and takes any size.

    Args:
        model: stays as it is.
        image_size: S in pixels; None: as it is.
        context_length: L in tokens; None: as it is.

    Raises:
        ModelError: the tower cannot be resized, or not to this size.
    """
    vision, text = model.config.vision_cfg, model.config.text_cfg
    state = dict(model.state_dict())
    if image_size is not None:
        vision = replace(vision, image_size=image_size)
        if not isinstance(model.visual, VisionTransformer | TimmTower):
            raise ModelError("the image size of OpenAI's ResNets is fixed by their pooling")
        if isinstance(model.visual, VisionTransformer):
            assert vision.patch_size is not None
            positions = state["visual.positional_embedding"]
            state["visual.positional_embedding"] = _image_positions(
                positions, image_size // vision.patch_size
            )
    if context_length is not None:
        if not isinstance(model.text, TextTransformer):
            raise ModelError(
                f"the context length of {text.hf_model_name} is the Hugging Face model's own; "
                "set text_cfg.context_length within it instead"
            )
        text = replace(text, context_length=context_length)
        positions = state["text.positional_embedding"]
        state["text.positional_embedding"] = _text_positions(positions, context_length)
    config = replace(model.config, vision_cfg=vision, text_cfg=text)
    resized = CLIP(config, getattr(model.text, "hf_config", None))
    resized.load_state_dict(state)
    if image_size is not None and isinstance(resized.visual, TimmTower):
        _check_size(resized.visual, image_size)
    return resized.train(model.training).to(model.logit_scale.device)


def resize_directory(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    image_size: int | None,
    context_length: int | None,
) -> dict[str, Any]:
    """`resize` from one model directory to another; returns what was written.

    Raises:
        ModelError: as in `resize`, a broken source, or `output` exists.
    """
    loaded = load_model(source)
    model = resize(loaded.model, image_size=image_size, context_length=context_length)
    size = model.config.vision_cfg.image_size
    save_model(
        output,
        model,
        Preprocess(size, loaded.preprocess.config),
        {**loaded.provenance, "resized_from": loaded.fingerprint},
        tokenizer=loaded.tokenizer,
    )
    return {
        "model": str(Path(output)),
        "image_size": size,
        "context_length": model.config.text_cfg.context_length,
        "fingerprint": fingerprint_of(output),
    }


def _image_positions(positions_NW: Tensor, side: int) -> Tensor:
    """The class token's stays; the patches' are a picture of G x G."""
    token_1W, grid_NW = positions_NW[:1], positions_NW[1:]
    old = math.isqrt(len(grid_NW))
    grid_1WGG = grid_NW.T.reshape(1, -1, old, old)
    grid_1WGG = F.interpolate(grid_1WGG, (side, side), mode="bicubic", antialias=True)
    return torch.cat([token_1W, grid_1WGG.flatten(2)[0].T])


def _text_positions(positions_LW: Tensor, length: int) -> Tensor:
    if length < 2:
        raise ModelError(f"context length {length}: start and end of text alone take 2")
    return F.interpolate(positions_LW.T[None], length, mode="linear")[0].T.contiguous()


def _check_size(tower: TimmTower, image_size: int) -> None:
    image = torch.zeros(1, 3, image_size, image_size)
    try:
        with torch.no_grad():
            tower.eval()(image)
    except (AssertionError, RuntimeError) as error:  # how timm's towers of one size refuse
        raise ModelError(
            f"{tower.config.timm_model_name} does not take {image_size} pixels ({error}); "
            "name the timm model of that size"
        ) from error
