"""One optimiser step, and the learning rate it is taken with."""

# b batch of this process, S image size, L context length

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from clip_models import CLIP, ContrastiveLoss, SigmoidLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.guard import Guard
from clip_train.optimizers import skips_on_device
from clip_train.order import derive_seed
from clip_train.sharding import is_sharded, local, scale, sync_scalars

MAX_LOGIT_SCALE = math.log(100)  # CLIP (2103.00020), section 2.5


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """open_clip's schedules: linear warm-up, then a cosine to zero, or constant with a cool-down.

    Args:
        step: counts from 0.
        steps: of the whole run.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done, of = step - config.warmup, steps - config.warmup
        return 0.5 * (1 + math.cos(math.pi * done / of)) * config.lr
    cooled = step - (steps - config.cooldown)
    return config.lr if cooled < 0 else config.lr * (1 - cooled / config.cooldown)


def make_loss(model: CLIP, config: TrainConfig, world: int) -> nn.Module:
    """SigLIP's loss for a model with a logit bias, CLIP's for others, over `world` processes."""
    kind = ContrastiveLoss if model.logit_bias is None else SigmoidLoss
    return kind(config.loss_exchange if world > 1 else None)


@dataclass(frozen=True)
class Update:
    """What a step found, left on the device: reading it waits for the step to finish."""

    loss: Tensor  # this process's; the mean over processes is the global batch's
    grad_norm: Tensor  # of the whole gradient, before clipping
    skipped: Tensor  # boolean: the weights are as they were


class Stepper:
    """Takes steps: forward, backward, update."""

    def __init__(
        self,
        wrapped: nn.Module,
        model: CLIP,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        normalize: Callable[[Tensor], Tensor],
        autocast: torch.dtype | None,
        world: int = 1,
    ) -> None:
        """A step of one of `world` processes.

        Args:
            wrapped: `model` itself, also where it is sharded; or in DDP.
            normalize: pixels as the loader gives them -> as the model takes them.
            autocast: what the towers compute in; parameters and loss stay float32. None: float32.

        Raises:
            TrainError: micro-batches in a model with batch norm.
        """
        self.wrapped = wrapped
        self.model = model
        self.optimizer = optimizer
        self.normalize = normalize
        self.autocast = autocast
        self.micro_batch_size = config.micro_batch_size
        self.grad_clip = config.grad_clip
        self.loss_of = make_loss(model, config, world)
        self.device = model.logit_scale.device
        fp16 = autocast == torch.float16
        self.guard = Guard(self.device, spike_factor=config.spike_factor, fp16=fp16)
        if self.micro_batch_size and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
            for m in model.modules()
        ):
            raise TrainError(
                "--micro-batch-size: this model's batch norm would see only micro-batches, not the "
                "batch; use --grad-checkpointing or more processes"
            )

    def step(self, images_b3SS: Tensor, tokens_bL: Tensor, *, lr: float, seed: int) -> Update:
        """Forward, backward, update.

        Args:
            images_b3SS: pixels for `normalize`.
            tokens_bL: int64 tokens.
            seed: of this step's random numbers (patch dropout, drop path) on this process.
        """
        loss = self.backward(images_b3SS, tokens_bL, seed)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = self._norm(parameters)
        skipped = self.guard.judge(grad_norm)
        if self.grad_clip:
            gradients = [cast(Tensor, p.grad) for p in parameters]
            scale(gradients, (self.grad_clip / (grad_norm + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._update(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return Update(loss, grad_norm, skipped)

    def backward(self, images_b3SS: Tensor, tokens_bL: Tensor, seed: int) -> Tensor:
        """Leave the gradient in the parameters, averaged over processes; return the loss.

        In micro-batches (GradCache, 2101.06983): all features without a graph, the loss and its
        gradient by the features, then each micro-batch again, with a graph and the same random
        numbers, to carry that gradient on to the parameters. Nothing is approximated.
        """
        size = self.micro_batch_size or len(images_b3SS)
        parts = list(zip(images_b3SS.split(size), tokens_bL.split(size), strict=True))
        if len(parts) == 1:
            loss = cast(Tensor, self.loss_of(*self._forward(*parts[0], seed, 0)))
            (loss * self.guard.scale).backward()
        else:
            with torch.no_grad():
                outputs = [self._forward(*part, seed, n) for n, part in enumerate(parts)]
            leaves = [torch.cat(features) for features in list(zip(*outputs, strict=True))[:2]]
            leaves += [scalar for scalar in outputs[0][2:] if scalar is not None]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            loss = cast(Tensor, self.loss_of(*leaves))
            (loss * self.guard.scale).backward()
            slices = list(zip(*(cast(Tensor, x.grad).split(size) for x in leaves[:2]), strict=True))
            of_scalars = [leaf.grad for leaf in leaves[2:]]
            for n, part in enumerate(parts):
                last = n == len(parts) - 1
                with self._gradients_stay_here(not last):
                    output = [x for x in self._forward(*part, seed, n) if x is not None]
                    found = zip(output, [*slices[n], *(of_scalars if last else ())], strict=False)
                    pairs = [(x, grad) for x, grad in found if x.requires_grad]
                    torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
        self._settle()
        return loss.detach()

    def _forward(
        self, images_b3SS: Tensor, tokens_bL: Tensor, seed: int, part: int
    ) -> tuple[Tensor | None, ...]:
        torch.manual_seed(derive_seed(seed, part))
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled):
            return self.wrapped(self.normalize(images_b3SS), tokens_bL)

    def _gradients_stay_here(self, stay: bool) -> AbstractContextManager[object]:
        """DDP sums up a process's gradients and exchanges them once; FSDP always exchanges."""
        if stay and isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def _settle(self) -> None:
        """Average the whole gradients beside FSDP's shards, and take out fp16's scale."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if any(map(is_sharded, gradients)):
            sync_scalars(self.model)
        if self.guard.fp16:
            scale(gradients, 1 / self.guard.scale)

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        gradients = [cast(Tensor, p.grad) for p in parameters]
        shards = [local(g) for g in gradients if is_sharded(g)]
        norm = nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
        if not shards:
            return norm
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square)
        return (square + norm.square()).sqrt()

    def _update(self, skipped: Tensor) -> None:
        if skips_on_device(self.optimizer):
            # torch's protocol for GradScaler: the kernel leaves all as it is where this is 1
            self.optimizer.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()
