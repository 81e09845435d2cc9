"""The contrastive loss, in tiles.

The N x N matrix of logits is never held: a forward pass streams its row and column log-sum-exps
over tiles, and the backward pass computes each tile again (Inf-CL, 2410.17243, describes the same
idea). Memory is linear in N, the value and the gradients are those of the plain loss. Logits are
float32 under any autocast: near 100, bfloat16 logits are 0.5 apart.
"""

# n rows of this rank, N rows of all ranks, E embedding, R rows and C columns of a tile

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_gather

TILE_ROWS = 1024
TILE_COLUMNS = 4096  # a float32 tile is 16 MiB, and at most three are alive


def contrastive_loss(
    image_features_nE: Tensor,
    text_features_nE: Tensor,
    logit_scale: Tensor,
    *,
    gathered: bool = False,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, 2103.00020, Figure 3): the mean of both cross-entropies.

    Args:
        image_features_nE: rows of length 1; row i belongs to text row i.
        text_features_nE: rows of length 1.
        logit_scale: the factor on the cosine similarities (already exp'd), a scalar.
        gathered: features are this rank's; negatives come from every rank of the default process
            group, which all hold n rows, with gradients through the gather. The mean over ranks of
            the value is the loss of the global batch, and so is it of the gradients, which is what
            DDP computes (open_clip's `local_loss` with `gather_with_grad`).

    Returns:
        A float32 scalar (float64 for float64 features).
    """
    dtype = torch.float64 if image_features_nE.dtype == torch.float64 else torch.float32
    image, text = image_features_nE.to(dtype), text_features_nE.to(dtype)
    scale = logit_scale.to(dtype)
    if not gathered:
        return _apply(_SymmetricLoss, image, text, scale)
    images_NE = torch.cat(cast(tuple[Tensor, ...], all_gather(image)))
    texts_NE = torch.cat(cast(tuple[Tensor, ...], all_gather(text)))
    first = dist.get_rank() * len(image)
    image_to_text = _apply(_RowLoss, image, texts_NE, scale, first)
    text_to_image = _apply(_RowLoss, text, images_NE, scale, first)
    return (image_to_text + text_to_image) / 2


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    device = cast(Tensor, args[0]).device.type
    with torch.autocast(device, enabled=False):
        return cast(Tensor, function.apply(*args))


def _tiles(rows: int, columns: int) -> list[tuple[slice, slice]]:
    """All tiles of a matrix, row blocks outermost."""
    return [
        (slice(r, min(r + TILE_ROWS, rows)), slice(c, min(c + TILE_COLUMNS, columns)))
        for r in range(0, rows, TILE_ROWS)
        for c in range(0, columns, TILE_COLUMNS)
    ]


def _add_lse(total: Tensor, tile_lse: Tensor) -> None:
    """total <- log(exp(total) + exp(tile_lse)), in place."""
    torch.logaddexp(total, tile_lse, out=total)


class _SymmetricLoss(torch.autograd.Function):
    """Both directions at once on one device: each tile of logits serves its rows and columns."""

    @staticmethod
    def forward(ctx: Any, image_NE: Tensor, text_NE: Tensor, scale: Tensor) -> Tensor:
        n = len(image_NE)
        rows_lse = image_NE.new_full((n,), -torch.inf)
        columns_lse = rows_lse.clone()
        scaled_NE = image_NE * scale
        for rows, columns in _tiles(n, n):
            logits_RC = scaled_NE[rows] @ text_NE[columns].T
            _add_lse(rows_lse[rows], logits_RC.logsumexp(1))
            _add_lse(columns_lse[columns], logits_RC.logsumexp(0))
        positives_N = (scaled_NE * text_NE).sum(1)
        ctx.save_for_backward(image_NE, text_NE, scale, rows_lse, columns_lse)
        return ((rows_lse + columns_lse) / 2 - positives_N).mean()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride], torch's takes *Any
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        image_NE, text_NE, scale, rows_lse, columns_lse = ctx.saved_tensors
        n = len(image_NE)
        scaled_NE = image_NE * scale
        # d loss / d logits = (softmax over the row + softmax over the column) / 2n - identity / n
        d_scaled, d_text = -text_NE / n, -scaled_NE / n
        for rows, columns in _tiles(n, n):
            logits_RC = scaled_NE[rows] @ text_NE[columns].T
            weights_RC = (logits_RC - rows_lse[rows, None]).exp_()
            weights_RC += logits_RC.sub_(columns_lse[columns]).exp_()
            weights_RC *= 0.5 / n
            d_scaled[rows] += weights_RC @ text_NE[columns]
            d_text[columns] += weights_RC.T @ scaled_NE[rows]
        return d_scaled * (scale * grad), d_text * grad, (d_scaled * image_NE).sum() * grad


class _RowLoss(torch.autograd.Function):
    """Cross-entropy of n rows against N keys, the positive of row i being key first + i."""

    @staticmethod
    def forward(ctx: Any, query_nE: Tensor, key_NE: Tensor, scale: Tensor, first: int) -> Tensor:
        n = len(query_nE)
        rows_lse = query_nE.new_full((n,), -torch.inf)
        scaled_nE = query_nE * scale
        for rows, columns in _tiles(n, len(key_NE)):
            _add_lse(rows_lse[rows], (scaled_nE[rows] @ key_NE[columns].T).logsumexp(1))
        positives_n = (scaled_nE * key_NE[first : first + n]).sum(1)
        ctx.save_for_backward(query_nE, key_NE, scale, rows_lse)
        ctx.first = first
        return (rows_lse - positives_n).mean()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride], torch's takes *Any
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        query_nE, key_NE, scale, rows_lse = ctx.saved_tensors
        n, positives = len(query_nE), slice(ctx.first, ctx.first + len(query_nE))
        scaled_nE = query_nE * scale
        d_scaled, d_key = -key_NE[positives] / n, torch.zeros_like(key_NE)
        d_key[positives] = -scaled_nE / n
        for rows, columns in _tiles(n, len(key_NE)):
            weights_RC = scaled_nE[rows] @ key_NE[columns].T
            weights_RC = weights_RC.sub_(rows_lse[rows, None]).exp_().div_(n)
            d_scaled[rows] += weights_RC @ key_NE[columns]
            d_key[columns] += weights_RC.T @ scaled_nE[rows]
        d_scale = (d_scaled * query_nE).sum() * grad
        return d_scaled * (scale * grad), d_key * grad, d_scale, None
