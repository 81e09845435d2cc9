"""Linear probes by AdamW: a grid of learning rates, epochs and weight decays in one run.

Each setting is what one run of CLIP_benchmark's loop gives (metrics/linear_probe.py): a linear
layer with a bias, mean cross entropy, AdamW, the learning rate from its peak to 0 along half a
cosine without warm-up. All settings meet the same mini-batches: their weights are the columns of
one matrix, so that a batch is multiplied once for all, and torch's own optimizer steps each with
its learning rate. A setting of fewer epochs leaves when it is done.
"""

# N samples, B batch, D features, C classes, G settings

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


class AdamSetting(NamedTuple):
    """One run's hyper-parameters. AdamW without decay is Adam."""

    lr: float
    epochs: int
    weight_decay: float = 0.0


def fit_adam(
    features_ND: Tensor,
    labels_N: Tensor,
    classes: int,
    grid: Sequence[AdamSetting],
    *,
    batch_size: int = 256,
    seed: int = 0,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Train every setting of `grid` -> weight [G, C, D] and bias [G, C], float32.

    Args:
        features_ND: used as they are, in float32; all happens on their device.
        labels_N: 0 … C - 1.
        classes: C.
        grid: the settings, in any order.
        batch_size: B; the last batch of an epoch is what remains.
        seed: of the start and the order; see `epoch_order`.
        start: weight [C, D] and bias [C] to start from, instead of torch.nn.Linear's own.

    Memory: the optimizer's, four times the weights of the grid, and B x G x C logits.
    """
    x_ND, width = features_ND.float(), features_ND.shape[1] + 1
    x_ND = F.pad(x_ND, (0, 1), value=1.0)  # the constant's weight is the bias
    weight_CD, bias_C = start or _start(classes, width - 1, seed)
    first_CD = torch.cat([weight_CD, bias_C[:, None]], dim=1).to(x_ND.device)
    # those of most epochs first, so that the settings that still run are the first rows
    order = sorted(range(len(grid)), key=lambda g: -grid[g].epochs)
    weight_GCD = first_CD.float().repeat(len(grid), 1, 1)
    grad_GCD = torch.empty_like(weight_GCD)
    parameters = [torch.nn.Parameter(w) for w in weight_GCD]  # views: one storage
    for parameter, grad in zip(parameters, grad_GCD, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[row]], "lr": grid[g].lr, "weight_decay": grid[g].weight_decay}
            for row, g in enumerate(order)
        ],
        fused=True,
    )
    groups, steps = optimizer.param_groups, -(-len(x_ND) // batch_size)
    for epoch in tqdm(range(grid[order[0]].epochs), desc="AdamW", unit="epoch", disable=None):
        running = sum(grid[g].epochs > epoch for g in order)
        optimizer.param_groups = groups[:running]
        w_QD = weight_GCD[:running].view(-1, width)
        grad_QD = grad_GCD[:running].view(-1, width)
        order_N = epoch_order(len(x_ND), seed, epoch).to(x_ND.device)
        for step, rows_B in enumerate(order_N.split(batch_size)):
            for group, g in zip(optimizer.param_groups, order, strict=False):
                done = (epoch * steps + step) / (grid[g].epochs * steps)
                group["lr"] = grid[g].lr * 0.5 * (1 + math.cos(math.pi * done))
            x_BD, labels_B = x_ND[rows_B], labels_N[rows_B]
            p_BGC = (x_BD @ w_QD.T).view(len(rows_B), running, classes).softmax(-1)
            p_BGC[torch.arange(len(rows_B), device=rows_B.device), :, labels_B] -= 1
            torch.mm(p_BGC.flatten(1).T, x_BD, out=grad_QD).div_(len(rows_B))
            optimizer.step()
    placed = torch.empty_like(weight_GCD)
    placed[torch.tensor(order)] = weight_GCD
    return placed[..., :-1], placed[..., -1]


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows [N] in one epoch: a function of its arguments."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def _start(classes: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """torch.nn.Linear's uniform start, of the seed's own."""
    bound = 1 / math.sqrt(width)
    generator = torch.Generator().manual_seed(seed)
    weight_CD = torch.empty(classes, width).uniform_(-bound, bound, generator=generator)
    return weight_CD, torch.empty(classes).uniform_(-bound, bound, generator=generator)
