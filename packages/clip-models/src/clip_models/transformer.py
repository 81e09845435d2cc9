"""One transformer for both towers, over sequences laid end to end without padding.

Rows are tokens, not (sequence, position) pairs: captions of different length follow one another,
so linear layers and norms never touch a padded position. Only attention has to know where a
sequence starts and ends. Module and parameter names are open_clip's, so its weights load without
translation.
"""

# T tokens of all sequences, S sequences, L length of one sequence, D width, H heads, K head width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_models.eager import eager


@dataclass(frozen=True)
class Dense:
    """Sequences of one length: an image's patches, or captions with their padding.

    Attributes:
        length: L.
        causal: a token sees only the tokens before it and itself.
        pooled_S: the row of each sequence's pooled token, its class token for example; a causal
            sequence's must be its last if the last block is computed for it alone.
    """

    length: int
    causal: bool
    pooled_S: Tensor


@dataclass(frozen=True)
class Packed:
    """Causal sequences of different lengths, shortest first, each pooled at its last token.

    Attributes:
        groups: (number of sequences, their length) for each stretch of equally long sequences.
        bounds_S1: int32, the row where each sequence starts, and T.
        longest: at least the longest length; a constant, so that compiled code fits every batch.
        pooled_S: the row of each sequence's last token.
    """

    groups: Sequence[tuple[int, int]]
    bounds_S1: Tensor
    longest: int
    pooled_S: Tensor


Layout = Dense | Packed


@dataclass(frozen=True)
class BlockConfig:
    """What every block of a tower has in common.

    Attributes:
        width: D.
        heads: H.
        mlp_ratio: width of the MLP over D.
        quick_gelu: OpenAI's activation instead of GELU.
        gelu: GELU's `approximate`, "none" or "tanh".
        norm_eps: of the layer norms.
        ls_init_value: start of LayerScale (2103.17239); None: none.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    quick_gelu: bool = False
    gelu: str = "none"
    norm_eps: float = 1e-5
    ls_init_value: float | None = None


class LayerNorm(nn.LayerNorm):
    """Layer norm that returns its input's dtype: autocast computes it in fp32, as in open_clip."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, torch names it so
        return super().forward(input).to(input.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation that OpenAI's models were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """A learned gain on a block's branch."""

    def __init__(self, width: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


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
        q, k, v = F.linear(x_TD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if isinstance(layout, Dense):
            sequences = len(x_TD) // layout.length
            y_TD = _attend(q, k, v, sequences, self.heads, causal=layout.causal)
        elif _has_varlen(q):
            bounds_S1, longest = layout.bounds_S1, layout.longest
            y_TD = _attend_varlen(q, k, v, bounds_S1, longest, layout, self.heads)
        else:
            y_TD = _attend_groups(q, k, v, layout, self.heads, causal=True)
        return cast(Tensor, self.out_proj(y_TD))

    def pooled(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """Only each sequence's pooled token attends: [T, D] -> [S, D].

        It sees its whole sequence: in a causal one because it is the last token.
        """
        width = x_TD.shape[-1]
        w_q, w_kv = self.in_proj_weight.split([width, 2 * width])
        b_q, b_kv = self.in_proj_bias.split([width, 2 * width])
        q = F.linear(x_TD[layout.pooled_S], w_q, b_q)
        k, v = F.linear(x_TD, w_kv, b_kv).chunk(2, dim=-1)
        if isinstance(layout, Dense):
            y_SD = _attend(q, k, v, len(q), self.heads, causal=False)
        elif _has_varlen(q):
            ones_S1 = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32)
            y_SD = _attend_varlen(q, k, v, ones_S1, 1, layout, self.heads)
        else:
            y_SD = _attend_groups(q, k, v, layout, self.heads, causal=False)
        return cast(Tensor, self.out_proj(y_SD))


def _has_varlen(x: Tensor) -> bool:
    """Whether torch has an attention for packed rows of this kind: flash, in half precision."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


# Queries, keys and values are [rows, D], a row a query or token: q [T, D] or, of the pooled tokens
# alone, [S, D]; k and v [T, D]. So is the result, a row a query.


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds_S1: Tensor, longest: int, layout: Packed, heads: int
) -> Tensor:
    """Queries that lie within `bounds_S1`."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler: seconds

    # a query alone is the last of its sequence and sees all of it
    window = (-1, 0) if longest > 1 else (-1, -1)
    q, k, v = (x.view(len(x), heads, -1) for x in (q, k, v))
    k_bounds, k_longest = layout.bounds_S1, layout.longest
    y = varlen_attn(q, k, v, bounds_S1, k_bounds, longest, k_longest, window_size=window)
    return cast(Tensor, y).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, sequences: int, heads: int, *, causal: bool) -> Tensor:
    """Sequences of one length, with all their tokens as queries, or one of each."""
    width = q.shape[-1] // heads
    q_SHLK, k, v = (x.view(sequences, -1, heads, width).transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.bfloat16 and q.requires_grad and q.device.type == "cpu":
        # in bfloat16 its way back takes up to five times as long
        with torch.autocast("cpu", enabled=False):
            y_SHLK = F.scaled_dot_product_attention(
                q_SHLK.float(), k.float(), v.float(), is_causal=causal
            ).to(q.dtype)
    else:
        y_SHLK = F.scaled_dot_product_attention(q_SHLK, k, v, is_causal=causal)
    return y_SHLK.transpose(1, 2).reshape(q.shape)


# Without varlen attention: once for each distinct length, on views of the rows. Kept out of
# torch.compile, which would compile anew for every batch's lengths.
@eager
def _attend_groups(
    q: Tensor, k: Tensor, v: Tensor, layout: Packed, heads: int, *, causal: bool
) -> Tensor:
    """Packed sequences, with all their tokens as queries (causal), or the last of each."""
    counts = [count for count, _ in layout.groups]
    tokens = [count * length for count, length in layout.groups]
    queries = tokens if causal else counts
    rows = zip(q.split(queries), k.split(tokens), v.split(tokens), counts, strict=True)
    parts = [_attend(*row, heads, causal=causal) for row in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.c_fc = nn.Linear(config.width, hidden)
        self.gelu = QuickGELU() if config.quick_gelu else nn.GELU(config.gelu)
        self.c_proj = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width, ls = config.width, config.ls_init_value
        self.ln_1 = LayerNorm(width, config.norm_eps)
        self.attn = Attention(width, config.heads)
        self.ls_1 = nn.Identity() if ls is None else LayerScale(width, ls)
        self.ln_2 = LayerNorm(width, config.norm_eps)
        self.mlp = MLP(config)
        self.ls_2 = nn.Identity() if ls is None else LayerScale(width, ls)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        x_TD = x_TD + self.ls_1(self.attn(self.ln_1(x_TD), layout))
        return x_TD + self.ls_2(self.mlp(self.ln_2(x_TD)))

    def pooled(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The block's output for the pooled tokens alone: [T, D] -> [S, D]."""
        attended_SD = self.ls_1(self.attn.pooled(self.ln_1(x_TD), layout))
        x_SD = x_TD[layout.pooled_S] + attended_SD
        return x_SD + self.ls_2(self.mlp(self.ln_2(x_SD)))


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        grad_checkpointing: recompute each block in the backward pass instead of keeping it.
    """

    def __init__(self, config: BlockConfig, layers: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(Block(config) for _ in range(layers))

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
