"""Image towers: the native vision transformer, and any timm model.

Both have `features(images)`, the pooled features before the projection, and `forward(images)`,
the embedding.
"""

# B batch, C channels, N patches, one more with the class token, D pixels of a patch, W width of the
# tower, E embedding

from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_models.config import VisionConfig
from clip_models.errors import ModelError
from clip_models.freeze import freeze_all_but, still_locked_norms
from clip_models.transformer import BlockConfig, Dense, LayerNorm, Transformer

if TYPE_CHECKING:
    from clip_models.resnet_tower import ModifiedResNet


class VisionTransformer(nn.Module):
    """CLIP's ViT (Dosovitskiy et al. 2020, with a norm before the first block).

    Attributes:
        fast: compute the last block for the pooled token only; off in tests that compare.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.fast = True
        patch, layers = cast(int, config.patch_size), cast(int, config.layers)
        patches = (config.image_size // patch) ** 2
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre = nn.Identity() if config.no_ln_pre else LayerNorm(width)
        block = BlockConfig(
            width=width,
            heads=width // config.head_width,
            mlp_ratio=config.mlp_ratio,
            quick_gelu=quick_gelu,
            ls_init_value=config.ls_init_value,
        )
        self.transformer = Transformer(block, layers)
        self.ln_post = LayerNorm(width)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S], normalised -> [B, W], pooled and normed."""
        size = self.config.image_size
        if images_BCHW.shape[1:] != (3, size, size):
            raise ModelError(
                f"images of shape {tuple(images_BCHW.shape)}; "
                f"this tower takes [B, 3, {size}, {size}]"
            )
        x_BNW = self._embed_patches(images_BCHW)
        batch = x_BNW.shape[0]
        class_token = self.class_embedding.to(x_BNW.dtype).expand(batch, 1, -1)
        x_BNW = torch.cat([class_token, x_BNW], dim=1)
        x_BNW = self._drop_patches(x_BNW + self.positional_embedding.to(x_BNW.dtype))
        length = x_BNW.shape[1]
        starts_B = torch.arange(0, batch * length, length, device=x_BNW.device)
        layout = Dense(length, causal=False, pooled_S=starts_B)
        x_TW = self.ln_pre(x_BNW).flatten(0, 1)
        if self.config.pool_type == "avg":
            x_BNW = self.transformer(x_TW, layout).view(batch, length, -1)
            if self.config.final_ln_after_pool:
                return self.ln_post(x_BNW[:, 1:].mean(dim=1))
            return self.ln_post(x_BNW)[:, 1:].mean(dim=1)
        if self.fast:
            return self.ln_post(self.transformer.pooled(x_TW, layout))
        return self.ln_post(self.transformer(x_TW, layout)[layout.pooled_S])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S], normalised -> [B, E]"""
        return self.features(images_BCHW) @ self.proj

    def _embed_patches(self, images_BCHW: Tensor) -> Tensor:
        """`conv1`, whose patches do not overlap, as one product, which is faster."""
        patch = cast(int, self.config.patch_size)
        rows = self.config.image_size // patch
        images_BCHW = images_BCHW[:, :, : rows * patch, : rows * patch]
        x = images_BCHW.unflatten(3, (rows, patch)).unflatten(2, (rows, patch))
        patches_BND = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BND, self.conv1.weight.flatten(1))

    def _drop_patches(self, x_BNW: Tensor) -> Tensor:
        """Keep the class token and a random share of the patches in training (FLIP, 2212.00794)."""
        share = self.config.patch_dropout
        if not self.training or share == 0:
            return x_BNW
        batch, length, width = x_BNW.shape
        keep = max(1, int((length - 1) * (1 - share)))
        chosen = torch.rand(batch, length - 1, device=x_BNW.device).topk(keep).indices + 1
        patches = x_BNW.gather(1, chosen.unsqueeze(-1).expand(-1, -1, width))
        return torch.cat([x_BNW[:, :1], patches], dim=1)

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze all but the last groups: the projection, the last block and norm, each block."""
        blocks = list(self.transformer.resblocks)
        freeze_all_but(
            unlocked_groups,
            self,
            [
                [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre],
                *([block] for block in blocks[:-1]),
                [blocks[-1], self.ln_post],
                [self.proj],
            ],
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable


class TimmTower(nn.Module):
    """A timm model as image tower, with the pooling, projection and names of open_clip's.

    `timm_proj` is "linear", "mlp", "none" (no projection) or null/"" (the model's own classifier
    projects).
    """

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        import timm  # takes seconds, and native towers do without
        from timm.layers.mlp import Mlp

        super().__init__()
        self.config = config
        name, proj = cast(str, config.timm_model_name), config.timm_proj
        if proj not in ("linear", "mlp", "none", "", None):
            raise ModelError(f"vision_cfg: timm_proj {proj!r}; known: linear, mlp, none, null")
        if config.timm_pool in ("abs_attn", "rot_attn"):
            raise ModelError(
                f"vision_cfg: timm_pool {config.timm_pool!r} is not supported; use the model's "
                "own pooling ('') or 'avg', or open this model in open_clip"
            )
        options: dict[str, Any] = {}
        if config.timm_drop_path is not None:
            options["drop_path_rate"] = config.timm_drop_path
        if config.patch_dropout > 0:
            options["patch_drop_rate"] = config.patch_dropout
        if not timm.is_model(name):
            raise ModelError(f"vision_cfg: timm {timm.__version__} has no model {name!r}")
        if proj in ("linear", "mlp"):
            self.trunk: Any = timm.create_model(name, **options)
            pool = {"global_pool": config.timm_pool} if config.timm_pool else {}
            self.trunk.reset_classifier(0, **pool)
        else:
            classes = 0 if proj == "none" else embed_dim
            pool = config.timm_pool
            self.trunk = timm.create_model(name, num_classes=classes, global_pool=pool, **options)
        self.trunk.to(memory_format=torch.channels_last)  # convolutions run faster so
        self.head = nn.Sequential()
        width, bias = int(self.trunk.num_features), config.timm_proj_bias
        if proj == "linear":
            self.head.add_module("drop", nn.Dropout(config.timm_drop))
            self.head.add_module("proj", nn.Linear(width, embed_dim, bias=bias))
        elif proj == "mlp":
            drop = (config.timm_drop, 0.0)
            mlp = Mlp(width, 2 * embed_dim, embed_dim, drop=drop, bias=(True, bias))
            self.head.add_module("mlp", mlp)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S], normalised -> [B, W], pooled."""
        images = images_BCHW.contiguous(memory_format=torch.channels_last)
        return self.trunk.forward_head(self.trunk.forward_features(images), pre_logits=True)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S], normalised -> [B, E]"""
        return self.head(self.trunk(images_BCHW.contiguous(memory_format=torch.channels_last)))

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze the trunk, or all of it but its last groups as timm counts them.

        The projection in `head` stays free. Locked batch norms keep their statistics.
        """
        from timm.models import group_parameters

        groups: Any = group_parameters(self.trunk, self.trunk.group_matcher())
        for group in sorted(groups)[: len(groups) - unlocked_groups]:
            for name in groups[group]:
                self.trunk.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        still_locked_norms(self.trunk)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stages in the backward pass, where the timm model offers it."""
        self.trunk.set_grad_checkpointing(enable)


def build_image_tower(
    config: VisionConfig, embed_dim: int, quick_gelu: bool
) -> "VisionTransformer | TimmTower | ModifiedResNet":
    """The tower that `config` describes, with random weights."""
    if config.timm_model_name is not None:
        return TimmTower(config, embed_dim)
    if isinstance(config.layers, tuple):
        from clip_models.resnet_tower import ModifiedResNet

        return ModifiedResNet(config, embed_dim)
    return VisionTransformer(config, embed_dim, quick_gelu)
