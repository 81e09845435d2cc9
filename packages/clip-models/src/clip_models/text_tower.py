"""CLIP's text transformer, on captions packed without padding where attention is causal."""

# B batch, L context length, T tokens of all captions, W width, E embedding

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_models.config import ModelConfig, TextConfig
from clip_models.eager import eager
from clip_models.errors import ModelError
from clip_models.freeze import freeze_all_but
from clip_models.transformer import (
    Block,
    BlockConfig,
    Dense,
    LayerNorm,
    Layout,
    Packed,
    Transformer,
)

if TYPE_CHECKING:
    from clip_models.hf_text_tower import HFTextTower


class TextTransformer(nn.Module):
    """A transformer over tokens, read at one of them: the end of text (the highest id) in CLIP.

    Where attention is causal nothing after that token can reach the embedding: those positions
    are dropped before the first layer, and the result is the same. SigLIP's attention is not
    causal and sees the padding, as it was trained to.

    Attributes:
        fast: pack the captions and compute the last block for the pooled token only; off in tests
            that compare.
    """

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.fast = True
        block = BlockConfig(
            width=width,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            quick_gelu=quick_gelu,
            gelu=(config.act_kwargs or {}).get("approximate", "none"),
            norm_eps=(config.norm_kwargs or {}).get("eps", 1e-5),
            ls_init_value=config.ls_init_value,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(block, config.layers)
        self.ln_final = LayerNorm(width, block.norm_eps)
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if config.proj_type == "linear" and config.proj_bias:
            self.text_projection = nn.Linear(width, embed_dim)
        elif config.proj_type == "linear":
            self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self._init_parameters()

    def _init_parameters(self) -> None:
        """OpenAI's initialisation, as in open_clip."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def features(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, <= L], zero-padded -> [B, W], pooled and normed.

        Tokens may stay on the CPU: caption lengths are then known without waiting for the GPU.
        """
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] > self.config.context_length:
            raise ModelError(
                f"tokens of shape {tuple(tokens_BL.shape)}; this tower takes "
                f"[B, at most {self.config.context_length}]"
            )
        tokens_T, positions_T, layout, restore_B = self._lay_out(tokens_BL)
        # not `positional_embedding[positions_T]`: on several CPU threads its gradient is summed up
        # in the order in which they come, which no two runs share
        x_TW = self.token_embedding(tokens_T) + F.embedding(positions_T, self.positional_embedding)
        if self.fast:
            pooled_BW = self.transformer.pooled(x_TW, layout)
        else:
            pooled_BW = self.transformer(x_TW, layout)[layout.pooled_S]
        return self.ln_final(pooled_BW if restore_B is None else pooled_BW[restore_B])

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, <= L], zero-padded -> [B, E]"""
        features_BW = self.features(tokens_BL)
        if self.text_projection is None:
            return features_BW
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(features_BW)
        return features_BW @ self.text_projection

    # sizes here depend on the data: nothing for torch.compile
    @eager
    def _lay_out(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor, Layout, Tensor | None]:
        """Tokens and positions [T], their layout, and the place of each caption in it."""
        device = self.positional_embedding.device
        batch, length = tokens_BL.shape
        pooled_B = self._pooled_position(tokens_BL)
        if self.config.no_causal_mask or not self.fast:
            starts_B = torch.arange(batch, device=device) * length
            positions_T = torch.arange(length, device=device).repeat(batch)
            layout = Dense(length, not self.config.no_causal_mask, starts_B + pooled_B.to(device))
            return tokens_BL.flatten().to(device), positions_T, layout, None

        def on_device(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        lengths_B, order_B = (pooled_B + 1).sort()
        kept_BL = torch.arange(length, device=tokens_BL.device) < lengths_B.unsqueeze(1)
        rows_T, positions_T = kept_BL.nonzero(as_tuple=True)
        found, counts = lengths_B.unique_consecutive(return_counts=True)
        ends_B = lengths_B.cumsum(0)
        layout = Packed(
            groups=list(zip(counts.tolist(), found.tolist(), strict=True)),
            bounds_S1=on_device(torch.cat([ends_B.new_zeros(1), ends_B]).int()),
            longest=self.config.context_length,
            pooled_S=on_device(ends_B - 1),
        )
        tokens_T = tokens_BL[order_B][rows_T, positions_T]
        return on_device(tokens_T), on_device(positions_T), layout, on_device(order_B.argsort())

    def _pooled_position(self, tokens_BL: Tensor) -> Tensor:
        if self.config.pool_type == "first":
            return tokens_BL.new_zeros(len(tokens_BL))
        if self.config.pool_type == "last":
            return tokens_BL.new_full((len(tokens_BL),), tokens_BL.shape[1] - 1)
        if self.config.pool_type == "eos":
            return (tokens_BL == self.config.eos_id).int().argmax(dim=-1)
        return tokens_BL.argmax(dim=-1)

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze all but the last groups: the projection, the last block and norm, each block."""
        blocks = list(self.transformer.resblocks)
        freeze_all_but(
            unlocked_layers,
            self,
            [
                [self.token_embedding, self.positional_embedding],
                *([block] for block in blocks[:-1]),
                [blocks[-1], self.ln_final],
                *([[self.text_projection]] if self.text_projection is not None else []),
            ],
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable


def build_text_tower(config: ModelConfig, hf_config: Any = None) -> "TextTransformer | HFTextTower":
    """The tower that `config` describes, with random weights.

    Args:
        config: of the model.
        hf_config: the Hugging Face text model's own configuration, where the tower is one; None:
            read by its name.
    """
    if config.text_cfg.hf_model_name is not None:
        from clip_models.hf_text_tower import HFTextTower  # transformers takes seconds to import

        return HFTextTower(config.text_cfg, config.embed_dim, hf_config)
    return TextTransformer(config.text_cfg, config.embed_dim, config.quick_gelu)
