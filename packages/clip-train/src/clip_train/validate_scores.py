"""Loss and ranks of image-text pairs whose features are all there."""

# b pairs of a batch, N pairs, E embedding, R rows

from collections.abc import Generator
from contextlib import contextmanager

import torch
from clip_models import CLIP, ContrastiveLoss, SigmoidLoss
from torch import Tensor

TIE = 1e-6  # cosines this near are equal: float32 rounds them by about a tenth of it
_SCORES_AT_ONCE = 1 << 24  # 64 MiB


def mean_loss(model: CLIP, image_NE: Tensor, text_NE: Tensor, batch_size: int) -> float:
    """The model's loss of matching rows in float32: the mean over whole batches, the rest left out.

    CLIP's, or SigLIP's for a model with a logit bias. Fewer than `batch_size` pairs are a batch.
    """
    loss_of = ContrastiveLoss() if model.logit_bias is None else SigmoidLoss()
    size = min(batch_size, len(image_NE))
    whole = len(image_NE) // size * size
    batches = zip(image_NE[:whole].split(size), text_NE[:whole].split(size), strict=True)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    with full_precision():
        losses = [loss_of(image_bE, text_bE, scale, bias) for image_bE, text_bE in batches]
    return torch.stack(losses).mean().item()


def ranks(query_NE: Tensor, answer_NE: Tensor) -> Tensor:
    """How many answers are at least as near to each query as its own, the same row: int64 [N].

    0 is best. Ties count, so that features which all are equal find nothing; so does NaN. The
    [N, N] scores are held in blocks of rows.
    """
    found: list[Tensor] = []
    rows_at_once = max(1, _SCORES_AT_ONCE // len(answer_NE))
    with full_precision():
        for rows_R in torch.arange(len(query_NE), device=query_NE.device).split(rows_at_once):
            scores_RN = query_NE[rows_R] @ answer_NE.T
            own_R1 = scores_RN.gather(1, rows_R[:, None])
            found.append((scores_RN < own_R1 - TIE).logical_not_().sum(1) - 1)
    return torch.cat(found)


@contextmanager
def full_precision() -> Generator[None]:
    """No TF32: near a logit scale of 100 its cosines are too coarse to rank by."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
