"""The causal text transformer of CLIP, on captions packed without padding."""

# B batch, L context length, T tokens of all captions, W width, E embedding

from typing import cast

import torch
from torch import Tensor, nn

from clip_models.config import TextConfig
from clip_models.errors import ModelError
from clip_models.transformer import Block, LayerNorm, Layout, Transformer


class TextTransformer(nn.Module):
    """CLIP's text tower: the embedding is read at the end-of-text token (the highest id).

    Attention is causal, so nothing after the end of text can reach the embedding: those positions
    are dropped before the first layer, and the result is the same.

    Attributes:
        fast: pack the captions and compute the last block for the pooled token only; off in tests
            that compare.
    """

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.fast = True
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, quick_gelu
        )
        self.ln_final = LayerNorm(width)
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
        if not self.fast:
            return self._features_padded(tokens_BL)
        lengths = tokens_BL.argmax(dim=-1) + 1
        lengths, order = lengths.sort()
        kept = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) < lengths.unsqueeze(1)
        rows, positions = kept.nonzero(as_tuple=True)
        found, counts = lengths.unique_consecutive(return_counts=True)
        device = self.positional_embedding.device
        layout = Layout(
            groups=list(zip(counts.tolist(), found.tolist(), strict=True)),
            causal=True,
            pooled_S=(lengths.cumsum(0) - 1).to(device, non_blocking=True),
        )
        tokens_T = tokens_BL[order][rows, positions].to(device, non_blocking=True)
        x_TW = self._embed(tokens_T, positions.to(device, non_blocking=True))
        sorted_BW = self.transformer.pooled(x_TW, layout)
        return self.ln_final(sorted_BW[order.argsort().to(device, non_blocking=True)])

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, <= L], zero-padded -> [B, E]"""
        return self.features(tokens_BL) @ self.text_projection

    def _embed(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        return self.token_embedding(tokens_T) + self.positional_embedding[positions_T]

    def _features_padded(self, tokens_BL: Tensor) -> Tensor:
        """The textbook way: every position of every caption through every block."""
        tokens_BL = tokens_BL.to(self.positional_embedding.device)
        batch, length = tokens_BL.shape
        starts = torch.arange(batch, device=tokens_BL.device) * length
        layout = Layout([(batch, length)], True, starts + tokens_BL.argmax(dim=-1))
        positions = torch.arange(length, device=tokens_BL.device).repeat(batch)
        x_TW = self.transformer(self._embed(tokens_BL.flatten(), positions), layout)
        return self.ln_final(cast(Tensor, x_TW)[layout.pooled_S])
