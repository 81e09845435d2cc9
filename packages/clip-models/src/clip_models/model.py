"""CLIP: two towers and a temperature."""

# B batch, S image size, L context length, E embedding, W width of the image tower

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_models.config import ModelConfig
from clip_models.image_tower import build_image_tower
from clip_models.text_tower import build_text_tower


class Output(NamedTuple):
    """What the loss takes: `loss(*model(images, tokens))`."""

    image_features_BE: Tensor  # of length 1
    text_features_BE: Tensor  # of length 1
    logit_scale: Tensor  # the factor, exp of the parameter
    logit_bias: Tensor | None


class CLIP(nn.Module):
    """An image tower and a text tower that share an embedding (Radford et al., 2103.00020).

    Built with random weights, initialised as open_clip does; seed torch for a reproducible model.

    Attributes:
        config: what it was built from.
        visual: the image tower.
        text: the text tower.
        logit_scale: log of the factor on cosine similarities, a scalar.
        logit_bias: SigLIP's offset of the logits, a scalar; None in other models.
    """

    def __init__(self, config: ModelConfig, hf_config: Any = None) -> None:
        """Args: hf_config: a Hugging Face text model's own configuration; None: read by name."""
        super().__init__()
        self.config = config
        self.visual = build_image_tower(config.vision_cfg, config.embed_dim, config.quick_gelu)
        self.text = build_text_tower(config, hf_config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def encode_image(self, images_BCHW: Tensor, normalize: bool = False) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> embeddings [B, E], of length 1 if `normalize`."""
        features = self.visual(images_BCHW)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image_pre(self, images_BCHW: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> the tower's features before the projection [B, W]."""
        return self.visual.features(images_BCHW)

    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L], zero-padded -> embeddings [B, E], of length 1 if `normalize`."""
        features = self.text(tokens_BL)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> Output:
        """Normalised pixels [B, 3, S, S] and token ids [B, L] -> what the loss takes."""
        images_BE = self.encode_image(images_BCHW, normalize=True)
        texts_BE = self.encode_text(tokens_BL, normalize=True)
        return Output(images_BE, texts_BE, self.logit_scale.exp(), self.logit_bias)

    def lock_image_tower(self, unlocked_groups: int = 0) -> None:
        """Freeze the image tower except its last groups (LiT, 2111.07991), as open_clip counts.

        In a ViT the last group is the projection, then the last block with its norm, then block by
        block, then the patch embedding.
        """
        self.visual.lock(unlocked_groups)

    def lock_text_tower(self, unlocked_layers: int = 0) -> None:
        """Freeze the text tower except its last groups, counted as in the image tower."""
        self.text.lock(unlocked_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations within blocks and recompute them: less memory, a third more work."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
