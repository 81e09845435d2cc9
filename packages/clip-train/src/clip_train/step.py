"""One optimiser step, and the learning rate it is taken with."""

# b batch of this process, S image size, L context length

import math
from dataclasses import dataclass

import torch
from clip_models import CLIP, ContrastiveLoss, SigmoidLoss
from torch import Tensor, nn

from clip_train.config import TrainConfig

MAX_LOGIT_SCALE = math.log(100)  # CLIP (2103.00020), section 2.5


def learning_rate(step: int, config: TrainConfig) -> float:
    """open_clip's schedule: linear warm-up, then a cosine to zero. `step` counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done, steps = step - config.warmup, config.steps - config.warmup
    return 0.5 * (1 + math.cos(math.pi * done / steps)) * config.lr


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to gains, biases and the logit scale (as open_clip)."""
    return parameter.ndim >= 2 and "bias" not in name


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW in two groups, with and without weight decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=named[0][1].device.type in ("cpu", "cuda", "xpu", "mps"),
    )


def make_loss(model: CLIP, world: int) -> nn.Module:
    """SigLIP's loss for a model with a logit bias, CLIP's for others.

    `world` processes share the global batch. Each holds the texts of all: fast, and small beside
    the activations of its own pairs.
    """
    kind = ContrastiveLoss if model.logit_bias is None else SigmoidLoss
    return kind("gather" if world > 1 else None)


@dataclass(frozen=True)
class Update:
    """What a step found, left on the device: reading it waits for the step to finish."""

    loss: Tensor  # this process's; the mean over processes is the global batch's
    grad_norm: Tensor  # of the whole gradient, before clipping


def train_step(
    wrapped: nn.Module,
    model: CLIP,
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_b3SS: Tensor,
    tokens_bL: Tensor,
    *,
    lr: float,
    grad_clip: float,
    bf16: bool,
) -> Update:
    """Forward, backward, update.

    Args:
        wrapped: `model` itself, or in DDP, whose backward pass averages gradients over processes.
        loss_of: what `make_loss` gave.
        images_b3SS: normalised pixels.
        tokens_bL: int64 tokens.
        grad_clip: largest gradient norm; 0: no clipping.
        bf16: run the towers under bfloat16 autocast; parameters and loss stay float32.
    """
    with torch.autocast(images_b3SS.device.type, torch.bfloat16, enabled=bf16):
        output = wrapped(images_b3SS, tokens_bL)
    loss = loss_of(*output)
    loss.backward()

    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm, foreach=True)

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return Update(loss.detach(), grad_norm)
