"""OpenAI's ResNet as image tower, with open_clip's parameter names.

Three things set it apart from the usual ResNet: a stem of three convolutions, an average pool
before what would be a strided convolution (anti-aliasing), and attention as the last pooling.
"""

# B batch, C channels, H x H positions, N = H * H + 1, W width of the tower, E embedding

from collections import OrderedDict
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_models.config import VisionConfig
from clip_models.errors import ModelError
from clip_models.freeze import still_locked_norms


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the output has four times `planes`."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)  # a block starts as its shortcut
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            parts = {"-1": nn.AvgPool2d(stride), "0": conv, "1": nn.BatchNorm2d(outputs)}
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x_BCHH: Tensor) -> Tensor:
        shortcut = x_BCHH if self.downsample is None else self.downsample(x_BCHH)
        x_BCHH = F.relu(self.bn1(self.conv1(x_BCHH)), inplace=True)
        x_BCHH = F.relu(self.bn2(self.conv2(x_BCHH)), inplace=True)
        return F.relu(self.bn3(self.conv3(self.avgpool(x_BCHH))) + shortcut, inplace=True)


class AttentionPool2d(nn.Module):
    """Attention whose only query is the mean over positions: no other output would be read."""

    def __init__(self, side: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x_BWHH: Tensor) -> Tensor:
        """[B, W, H, H] -> [B, W], before the output projection."""
        x_BNW = x_BWHH.flatten(2).transpose(1, 2)
        x_BNW = torch.cat([x_BNW.mean(1, keepdim=True), x_BNW], dim=1)
        x_BNW = x_BNW + self.positional_embedding.to(x_BNW.dtype)
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(x_BNW[:, :1]), self.k_proj(x_BNW), self.v_proj(x_BNW))
        )
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet (Radford et al., 2103.00020, section 2.4); `config.layers` has four stages."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for stage, blocks in enumerate(cast(tuple[int, ...], config.layers)):
            planes = width * 2**stage
            first = Bottleneck(inputs, planes, stride=2 if stage else 1)
            inputs = 4 * planes
            rest = [Bottleneck(inputs, planes, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        side, heads = config.image_size // 32, inputs // config.head_width
        self.attnpool = AttentionPool2d(side, inputs, heads, embed_dim)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S], normalised -> [B, W], pooled, before the projection `attnpool.c_proj`."""
        size = self.config.image_size
        if images_BCHW.shape[1:] != (3, size, size):
            raise ModelError(
                f"images of shape {tuple(images_BCHW.shape)}; "
                f"this tower takes [B, 3, {size}, {size}]"
            )
        x = images_BCHW.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.avgpool(F.relu(self.bn3(self.conv3(x)), inplace=True))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.attnpool(x)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S], normalised -> [B, E]"""
        return self.attnpool.c_proj(self.features(images_BCHW))

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze the tower, all of it; its batch norms keep their statistics."""
        if unlocked_groups:
            raise ModelError(f"{unlocked_groups} groups to unlock: a ResNet is locked as a whole")
        self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; locked batch norms stay in eval mode."""
        super().train(mode)
        still_locked_norms(self)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raises ModelError if enabled: recomputing would count a batch twice in the norms."""
        if enable:
            raise ModelError(
                "a ResNet tower has no gradient checkpointing: its norms count batches"
            )
