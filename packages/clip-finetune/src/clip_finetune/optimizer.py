"""AdamW with the rates of its groups, and the learning rate's schedule."""

import math
import re
from typing import Any, cast

import torch
from torch import nn

from clip_finetune.config import TrainConfig
from clip_finetune.learner import Learner

# the native ViT's layers as timm's `group_matcher` describes its own: stem, blocks, last norm
_NATIVE_LAYERS = {
    "stem": r"visual\.(?:conv1|class_embedding|positional_embedding|ln_pre)",
    "blocks": [(r"visual\.transformer\.resblocks\.(\d+)", None), (r"visual\.ln_post", (99999,))],
}
_NO_DECAY = ("positional_embedding", "pos_embed", "cls_token", "logit_scale", "logit_bias")


def learning_rate(step: int, lr: float, steps: int, warmup: int) -> float:
    """The rate of update `step`, from 0: linear warm-up, cosine to zero (WiSE-FT's `cosine_lr`)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(learner: Learner, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; each group's `lr_scale` is its factor on the schedule's rate.

    With --layer-decay timm's groups: the heads and the projection learn at the full rate, each
    layer below at this factor of the one above it (BEiT, 2106.08254).
    """
    named = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    skipped = [
        name
        for name, p in named
        if config.decay == "matrices" and (p.ndim < 2 or name.endswith(_NO_DECAY))
    ]
    if config.layer_decay < 1:
        groups = _layer_groups(learner, config, skipped)
    else:
        kinds = [
            ([p for n, p in named if n not in skipped], config.weight_decay),
            ([p for n, p in named if n in skipped], 0.0),
        ]
        groups = [
            {"params": members, "weight_decay": decay, "lr_scale": 1.0}
            for members, decay in kinds
            if members
        ]
    fused = learner.head["bias_0"].device.type in ("cpu", "cuda", "xpu", "mps")
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _layer_groups(learner: Learner, config: TrainConfig, skipped: list[str]) -> list[Any]:
    from timm import optim

    return cast(Any, optim).param_groups_layer_decay(
        _Layered(learner),
        weight_decay=config.weight_decay,
        no_weight_decay_list=skipped,
        weight_decay_exclude_1d=False,  # `skipped` names them
        layer_decay=config.layer_decay,
    )


class _Layered(nn.Module):
    """A learner as timm's functions want it: with a description of its layers.

    Text towers have no layers here: FLYP's learn at the full rate.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.visual = learner.visual
        self.named = dict(learner.named_parameters())

    def named_parameters(self, *_args: Any, **_options: Any) -> Any:
        return iter(self.named.items())

    def group_matcher(self, coarse: bool = False) -> Any:
        trunk = cast(Any, getattr(self.visual, "trunk", None))
        if trunk is None:
            return _NATIVE_LAYERS
        # its own patterns are of names within it, without this prefix
        within: dict[str, Any] = trunk.group_matcher(coarse=coarse)
        return {group: _prefixed(pattern) for group, pattern in within.items()}


def _prefixed(pattern: Any) -> Any:
    if isinstance(pattern, str):
        bare = re.sub(r"(^|\|)\^", r"\1", pattern)  # each alternative starts the name
        return rf"^visual\.trunk\.(?:{bare})"
    if pattern is None:
        return None
    return [(_prefixed(part), suffix) for part, suffix in pattern]
