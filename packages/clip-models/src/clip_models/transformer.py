"""One transformer for both towers, over sequences laid end to end without padding.

Rows are tokens, not (sequence, position) pairs: captions of different length follow one another,
so linear layers and norms never touch a padded position. Only attention has to know where a
sequence starts and ends, and sequences come sorted by length, so it runs once per distinct length
on plain views of the rows. An image tower is the case of a single length.

Module and parameter names are open_clip's, so its weights load without translation.
"""

# T tokens of all sequences, S sequences, L length of one sequence, D width, H heads, K head width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Layout:
    """Where sequences lie in the token rows.

    Attributes:
        groups: (number of sequences, their length) for each stretch of equally long sequences.
        causal: a token sees only the tokens before it and itself.
        pooled_S: the row of each sequence's pooled token: its class token, or its end of text.
    """

    groups: Sequence[tuple[int, int]]
    causal: bool
    pooled_S: Tensor

    def split(self, x_TD: Tensor) -> list[Tensor]:
        """Each group's rows as [S, L, D] views."""
        rows = x_TD.split([count * length for count, length in self.groups])
        return [
            part.view(count, length, -1)
            for part, (count, length) in zip(rows, self.groups, strict=True)
        ]


class LayerNorm(nn.LayerNorm):
    """Layer norm that returns its input's dtype: autocast computes it in fp32, as in open_clip."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, torch names it so
        return super().forward(input).to(input.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation that OpenAI's models were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """Every token attends: [T, D] -> [T, D]."""
        qkv = F.linear(x_TD, self.in_proj_weight, self.in_proj_bias)
        parts: list[Tensor] = []
        for group in layout.split(qkv):
            q, k, v = self._heads(group).unbind(0)
            y_SHLK = F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal)
            parts.append(y_SHLK.transpose(1, 2).reshape(-1, x_TD.shape[-1]))
        return cast(Tensor, self.out_proj(parts[0] if len(parts) == 1 else torch.cat(parts)))

    def pooled(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """Only each sequence's pooled token attends: [T, D] -> [S, D].

        The pooled token sees its whole sequence: a class token does because image attention is not
        causal, an end of text because it is the last token.
        """
        width = x_TD.shape[-1]
        w_q, w_kv = self.in_proj_weight.split([width, 2 * width])
        b_q, b_kv = self.in_proj_bias.split([width, 2 * width])
        q_SD = F.linear(x_TD[layout.pooled_S], w_q, b_q)
        kv = F.linear(x_TD, w_kv, b_kv)
        parts: list[Tensor] = []
        queries = q_SD.split([count for count, _ in layout.groups])
        for q, group in zip(queries, layout.split(kv), strict=True):
            k, v = self._heads(group).unbind(0)
            y_SH1K = F.scaled_dot_product_attention(self._heads(q.unsqueeze(1))[0], k, v)
            parts.append(y_SH1K.reshape(-1, width))
        return cast(Tensor, self.out_proj(parts[0] if len(parts) == 1 else torch.cat(parts)))

    def _heads(self, x_SLD: Tensor) -> Tensor:
        """[S, L, n * D] -> [n, S, H, L, K]"""
        sequences, length, _ = x_SLD.shape
        head_width = self.out_proj.in_features // self.heads
        x = x_SLD.view(sequences, length, -1, self.heads, head_width)
        return x.permute(2, 0, 3, 1, 4)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), quick_gelu)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        x_TD = x_TD + self.attn(self.ln_1(x_TD), layout)
        return x_TD + self.mlp(self.ln_2(x_TD))

    def pooled(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The block's output for the pooled tokens alone: [T, D] -> [S, D]."""
        x_SD = x_TD[layout.pooled_S] + self.attn.pooled(self.ln_1(x_TD), layout)
        return x_SD + self.mlp(self.ln_2(x_SD))


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        grad_checkpointing: recompute each block in the backward pass instead of keeping it.
    """

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, quick_gelu: bool
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, quick_gelu) for _ in range(layers)
        )

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """All tokens through all blocks: [T, D] -> [T, D]."""
        return self._run(x_TD, layout, len(self.resblocks))

    def pooled(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The pooled tokens after all blocks: [T, D] -> [S, D].

        Equal to `forward(...)[layout.pooled_S]`; the last block, whose other outputs nobody reads,
        computes queries, attention output and MLP for the pooled tokens only.
        """
        x_TD = self._run(x_TD, layout, len(self.resblocks) - 1)
        last = cast(Block, self.resblocks[-1])
        if self.grad_checkpointing and self.training:
            return checkpoint(last.pooled, x_TD, layout, use_reentrant=False)
        return last.pooled(x_TD, layout)

    def _run(self, x_TD: Tensor, layout: Layout, blocks: int) -> Tensor:
        for block in list(self.resblocks)[:blocks]:
            if self.grad_checkpointing and self.training:
                x_TD = cast(Tensor, checkpoint(block, x_TD, layout, use_reentrant=False))
            else:
                x_TD = block(x_TD, layout)
        return x_TD
