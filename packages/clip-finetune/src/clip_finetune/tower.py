"""What a recipe changes in the image tower before training: its resolution, and drop-path."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from clip_models import CLIP, LoadedModel, ModelConfig, Preprocess
from torch import Tensor, nn

from clip_finetune.errors import FinetuneError
from clip_finetune.weights import combine

# B batch, N tokens of an image, W width


def prepare_tower(loaded: LoadedModel, *, image_size: int, drop_path: float) -> LoadedModel:
    """The model with an image tower for `image_size` pixels (0: as it is), and drop-path.

    Raises:
        FinetuneError: the tower has no such thing.
    """
    config, visual = loaded.config, cast(nn.Module, loaded.model.visual)
    timm = config.vision_cfg.timm_model_name is not None
    native = hasattr(visual, "transformer")
    size = image_size or config.vision_cfg.image_size
    resized = size != config.vision_cfg.image_size
    trunk = getattr(visual, "trunk", None)
    if resized and (getattr(trunk, "pos_embed", None) is not None or not (timm or native)):
        raise FinetuneError(
            f"--image-size {size}: this image tower is built for "
            f"{config.vision_cfg.image_size} pixels; expected a native ViT or a convolutional tower"
        )
    if drop_path and not (timm or native):
        raise FinetuneError("--drop-path: a ResNet of CLIP's has none; leave it at 0")
    if resized or (timm and drop_path):
        vision: dict[str, Any] = {"image_size": size}
        if drop_path and timm:
            vision["timm_drop_path"] = drop_path
        new_visual = _build_tower(config, vision)
        new_visual.load_state_dict(_resampled(visual.state_dict(), new_visual.state_dict()))
        loaded.model.visual = cast(Any, new_visual.eval().to(loaded.model.logit_scale.device))
    if drop_path and native:
        _add_drop_path(cast(nn.Module, loaded.model.visual), drop_path)
    # drop-path is training's alone: the model that is written says nothing of it
    config = replace(config, vision_cfg=replace(config.vision_cfg, image_size=size))
    loaded.model.config = config
    return replace(loaded, config=config, preprocess=Preprocess(size, loaded.preprocess.config))


def _build_tower(config: ModelConfig, changes: dict[str, Any]) -> nn.Module:
    """A random image tower; the text tower built beside it is as small as one can be."""
    values = ModelConfig.to_dict(config)
    values |= {
        "vision_cfg": asdict(replace(config.vision_cfg, **changes)),
        "text_cfg": {"context_length": 8, "width": 8, "heads": 1, "layers": 1},
    }
    try:
        return cast(nn.Module, CLIP(ModelConfig.from_dict(values)).visual)
    except TypeError as error:  # timm passes options on to the model's own constructor
        raise FinetuneError(f"this timm model takes no drop path ({error})") from error


def _resampled(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with position embeddings of another grid resampled as open_clip does it."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    name = "positional_embedding"
    if name not in old or old[name].shape == new[name].shape:
        return old
    side = round((len(new[name]) - 1) ** 0.5)
    resampled = resample_abs_pos_embed(old[name][None].cpu(), [side, side], num_prefix_tokens=1)
    return old | {name: resampled[0]}


def _add_drop_path(visual: nn.Module, rate: float) -> None:
    """Stochastic depth (1603.09382) by image, from 0 in the first block to `rate` in the last.

    By hooks on the last module of either branch: names of weights stay open_clip's.
    """
    batch = 1

    def note_batch(_tower: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal batch
        batch = len(inputs[0])

    visual.register_forward_pre_hook(note_batch)
    blocks = list(cast(Any, visual).transformer.resblocks)
    rates = torch.linspace(0, rate, len(blocks)).tolist()
    for block, share in zip(blocks, rates, strict=True):
        for branch in (block.ls_1, block.ls_2):
            branch.register_forward_hook(_drop_branch(share, lambda: batch))


def _drop_branch(rate: float, batch: Callable[[], int]) -> Callable[..., Tensor]:
    from timm.layers.drop import drop_path

    def drop(module: nn.Module, _inputs: Any, branch_TW: Tensor) -> Tensor:
        # rows are the tokens of one image after the other; in the last block one row an image
        branch_BNW = branch_TW.view(batch(), -1, branch_TW.shape[-1])
        return cast(Tensor, drop_path(branch_BNW, rate, module.training)).view_as(branch_TW)

    return drop


@torch.no_grad()
def blend_tower(
    clip: CLIP, theta0: dict[str, Tensor], theta1: dict[str, Tensor], alpha: float
) -> None:
    """Give the model (1 - alpha) theta0 + alpha theta1 for the weights that `theta0` names."""
    weights = clip.state_dict()
    for name, start in theta0.items():
        weights[name].copy_(combine([start, theta1[name]], [1 - alpha, alpha]))
