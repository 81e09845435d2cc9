"""The contrastive and the sigmoid loss, in tiles.

The N x N matrix of logits is never held: a tile at a time gives its share of the value and of the
gradients (Inf-CL, 2410.17243, describes the idea). Memory is linear in N; value and gradients are
the plain loss's. Logits are float32 under any autocast: near 100, bfloat16 logits are 0.5 apart.
"""

# n rows of this rank, m texts met at once, E embedding, R rows and C columns of a tile

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip_models.eager import eager
from clip_models.errors import ModelError
from clip_models.text_blocks import (
    Form,
    lse_to_owner,
    meet_texts,
    refuse_unequal_shapes,
    sum_to_owner,
)

# A tile of logits is made by one matrix product and passed over some five times. On a CPU it is
# about what the shared cache holds, so that the passes cost little, and no smaller: each kernel
# ends with its threads waiting for the last, which takes long where data workers want the cores as
# well. A GPU passes over it in its memory; its kernels must outlast the launch of the next.
CPU_TILE_BYTES = 16 << 20
GPU_TILE_BYTES = 128 << 20

# The largest spread of logits in a tile for which one exp serves rows and columns: e^-80 is a
# normal float32, so no row or column can vanish.
MAX_SPREAD = 80.0


class _PairLoss(nn.Module, ABC):
    """A loss of matching rows; `distributed` as in `ContrastiveLoss`."""

    def __init__(self, distributed: Form = None) -> None:
        super().__init__()
        if distributed not in (None, *get_args(get_args(Form)[0])):
            raise ModelError(f"distributed is {distributed!r}; expected None, 'gather' or 'ring'")
        self.distributed: Form = distributed
        self._shapes_agree = False

    def extra_repr(self) -> str:
        return f"distributed={self.distributed!r}"

    @eager  # loops over tiles and exchanges: nothing to gain, much to unroll
    def forward(
        self,
        image_features_nE: Tensor,
        text_features_nE: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """The loss of n pairs, a scalar: float64 for float64 features, float32 for all others.

        Args:
            image_features_nE: rows of length 1; row i belongs to text row i.
            text_features_nE: rows of length 1.
            logit_scale: the factor on the cosine similarities (already exp'd), a scalar.
            logit_bias: added to every logit, a scalar; None: 0.

        Raises:
            ModelError: shapes that do not fit together, or no process group.
        """
        self._check(image_features_nE, text_features_nE)
        dtype = torch.float64 if image_features_nE.dtype == torch.float64 else torch.float32
        bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
        with torch.autocast(image_features_nE.device.type, enabled=False):
            return self._value(
                image_features_nE.to(dtype),
                text_features_nE.to(dtype),
                logit_scale.to(dtype).reshape(()),
                bias.to(dtype).reshape(()),
            )

    @abstractmethod
    def _value(self, image_nE: Tensor, text_nE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """The loss in its own dtype, outside autocast."""

    def _check(self, image_nE: Tensor, text_nE: Tensor) -> None:
        if image_nE.ndim != 2 or image_nE.shape != text_nE.shape or not len(image_nE):
            raise ModelError(
                f"image features are {list(image_nE.shape)} and text features "
                f"{list(text_nE.shape)}; expected the same shape [rows, width] with a row or more: "
                "row i of one belongs to row i of the other"
            )
        if self.distributed is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ModelError(
                f"distributed={self.distributed!r} without a process group; call "
                "torch.distributed.init_process_group first (torchrun starts the processes), or "
                "use distributed=None for one process"
            )
        # Once: the comparison waits for the device, and a training step should not.
        if not self._shapes_agree:
            refuse_unequal_shapes(image_nE)
            self._shapes_agree = True


class ContrastiveLoss(_PairLoss):
    """Symmetric InfoNCE (CLIP, 2103.00020, Figure 3): the mean of both cross-entropies.

    Called as `loss(*model(images, tokens))`. A bias of the logits cancels: its gradient is 0.

    Args:
        distributed: None: the pairs of this process are the batch. Otherwise features are this
            rank's n rows of a batch over the default process group, on all ranks as many (compared
            at the first call only), with gradients for all of them. The mean over ranks of the
            value is the loss of the whole batch, and the mean over ranks of the gradients its
            gradient, which is what DDP computes (open_clip's `local_loss` with `gather_with_grad`).
            "gather": each rank holds the texts of all ranks; fast. "ring": texts travel from rank
            to rank, and none holds them all. Both compute an n x N share of the logits twice:
            forward and backward, which every rank must call in the same order.
    """

    def _value(self, image_nE: Tensor, text_nE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        value = cast(Tensor, _Contrastive.apply(image_nE, text_nE, scale, self.distributed))
        return value + 0 * bias


class SigmoidLoss(_PairLoss):
    """SigLIP's loss (2303.15343): each of the N x N pairs is classified as matching or not.

    The sum over texts and mean over images of -log sigmoid(label * logit), with label 1 for a
    row's own text and -1 for all others. `distributed` as in `ContrastiveLoss`. No row needs to
    know the others' logits, so a single pass over the tiles gives the value and the gradients.
    """

    def _value(self, image_nE: Tensor, text_nE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        leaves = image_nE, text_nE, scale, bias
        differentiate = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        return cast(Tensor, _Sigmoid.apply(*leaves, self.distributed, differentiate))


def _logit_tiles(
    image_nE: Tensor, text_mE: Tensor, scale: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and logits [R, C] of every tile: as square as the shape allows.

    The logits are good until the next tile, which takes their place in memory.
    """
    budget = GPU_TILE_BYTES if image_nE.is_cuda else CPU_TILE_BYTES
    logits = budget // image_nE.element_size()
    height = min(len(image_nE), 1 << math.isqrt(logits).bit_length() - 1)
    memory = image_nE.new_empty(min(logits, len(image_nE) * len(text_mE)))
    for rows in _spans(len(image_nE), height):
        scaled_RE = image_nE[rows] * scale
        for columns in _spans(len(text_mE), logits // height):
            text_CE = text_mE[columns]
            logits_RC = memory[: len(scaled_RE) * len(text_CE)].view(len(scaled_RE), len(text_CE))
            yield rows, columns, torch.mm(scaled_RE, text_CE.T, out=logits_RC)


def _spans(length: int, most: int) -> list[slice]:
    """Parts of about the same length; matrix products are faster at multiples of 64."""
    size = -(-length // -(-length // most))
    size = size if size < 64 else min(most, -(-size // 64) * 64)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _row_dots(a_nE: Tensor, b_nE: Tensor) -> Tensor:
    """a_i . b_i for all rows i, in parts: their products would be another n x E."""
    parts = zip(a_nE.split(4096), b_nE.split(4096), strict=True)
    return torch.cat([torch.linalg.vecdot(a, b) for a, b in parts])


def _common_shift(logits_RC: Tensor) -> Tensor | None:
    """What to take from all logits of a tile so that a single exp of each is exact, if anything.

    None on a GPU: to look at the spread would stop it, and exp costs it little.
    """
    if not logits_RC.is_cpu:
        return None
    low, high = logits_RC.aminmax()
    return high if (high - low).item() < MAX_SPREAD else None


def _add_lse(total: Tensor, more: Tensor) -> None:
    """total <- log(exp(total) + exp(more)), in place."""
    torch.logaddexp(total, more, out=total)


class _Contrastive(torch.autograd.Function):
    """Forward: log-sum-exps of rows and columns. Backward: softmaxes from these, tile by tile."""

    @staticmethod
    def forward(ctx: Any, image_nE: Tensor, text_nE: Tensor, scale: Tensor, form: Form) -> Tensor:
        rows_lse = image_nE.new_full((len(image_nE),), -torch.inf)

        def add_lses(texts: Sequence[Tensor], columns_lse: Tensor) -> None:
            for rows, columns, logits_RC in _logit_tiles(image_nE, texts[0], scale):
                shift = _common_shift(logits_RC)
                if shift is None:
                    of_rows, of_columns = logits_RC.logsumexp(1), logits_RC.logsumexp(0)
                else:
                    exp_RC = logits_RC.sub_(shift).exp_()
                    of_rows = exp_RC.sum(1).log_().add_(shift)
                    of_columns = exp_RC.sum(0).log_().add_(shift)
                _add_lse(rows_lse[rows], of_rows)
                _add_lse(columns_lse[columns], of_columns)

        nothing = torch.full_like(rows_lse, -torch.inf)
        columns_lse = meet_texts(form, [text_nE], nothing, add_lses, lse_to_owner)
        ctx.save_for_backward(image_nE, text_nE, scale, rows_lse, columns_lse)
        ctx.form = form
        positives_n = _row_dots(image_nE, text_nE) * scale
        return ((rows_lse + columns_lse) / 2 - positives_n).mean()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride], torch's takes *Any
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        image_nE, text_nE, scale, rows_lse, columns_lse = ctx.saved_tensors
        share = 1 / len(image_nE)
        # d loss / d logits = (softmax over the row + softmax over the column) / 2n - identity / n
        d_image_nE = text_nE * -share

        def add_gradients(texts: Sequence[Tensor], d_text_mE: Tensor) -> None:
            text_mE, columns_lse = texts
            for rows, columns, logits_RC in _logit_tiles(image_nE, text_mE, scale):
                rows_R1, columns_C = rows_lse[rows, None], columns_lse[columns]
                shift = _common_shift(logits_RC)
                if shift is None:
                    weights_RC = (logits_RC - rows_R1).exp_()
                    weights_RC += logits_RC.sub_(columns_C).exp_()
                else:  # a sum above is at least every summand: no factor exceeds e^MAX_SPREAD
                    weights_RC = (shift - rows_R1).exp_() + (shift - columns_C).exp_()
                    weights_RC *= logits_RC.sub_(shift).exp_()
                d_image_nE[rows].addmm_(weights_RC, text_mE[columns], alpha=share / 2)
                d_text_mE[columns].addmm_(weights_RC.T, image_nE[rows], alpha=share / 2)

        with torch.autocast(image_nE.device.type, enabled=False):
            texts, nothing = [text_nE, columns_lse], torch.zeros_like(text_nE)
            d_text_nE = meet_texts(ctx.form, texts, nothing, add_gradients, sum_to_owner)
            d_text_nE.sub_(image_nE, alpha=share)
            d_scale = _row_dots(d_image_nE, image_nE).sum() * grad
        factor = scale * grad
        return d_image_nE.mul_(factor), d_text_nE.mul_(factor), d_scale, None


class _Sigmoid(torch.autograd.Function):
    """Forward: the value, and the gradients if asked for. Backward: their product with `grad`."""

    @staticmethod
    def forward(
        ctx: Any,
        image_nE: Tensor,
        text_nE: Tensor,
        scale: Tensor,
        bias: Tensor,
        form: Form,
        differentiate: bool,
    ) -> Tensor:
        # All pairs as if they did not match, then the rows' own: softplus(-x) = softplus(x) - x.
        softplus_n, sigmoid_n = image_nE.new_zeros(2, len(image_nE)).unbind()
        d_image_nE = torch.zeros_like(image_nE)

        def add_all(texts: Sequence[Tensor], d_text_mE: Tensor) -> None:
            text_mE = texts[0]
            for rows, columns, logits_RC in _logit_tiles(image_nE, text_mE, scale):
                logits_RC += bias
                softplus_n[rows] -= F.logsigmoid(-logits_RC).sum(1)
                if differentiate:
                    weights_RC = logits_RC.sigmoid_()
                    sigmoid_n[rows] += weights_RC.sum(1)
                    d_image_nE[rows].addmm_(weights_RC, text_mE[columns])
                    d_text_mE[columns].addmm_(weights_RC.T, image_nE[rows])

        nothing = torch.zeros_like(text_nE)
        d_text_nE = meet_texts(form, [text_nE], nothing, add_all, sum_to_owner)
        if differentiate:
            d_image_nE.sub_(text_nE)
            d_text_nE.sub_(image_nE)
            d_scale = _row_dots(d_image_nE, image_nE).mean()
            factor = scale / len(image_nE)
            d_image_nE.mul_(factor)
            d_text_nE.mul_(factor)
            ctx.save_for_backward(d_image_nE, d_text_nE, d_scale, (sigmoid_n - 1).mean())
        positives_n = _row_dots(image_nE, text_nE) * scale + bias
        return (softplus_n - positives_n).mean()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride], torch's takes *Any
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *(gradient * grad for gradient in ctx.saved_tensors), None, None
