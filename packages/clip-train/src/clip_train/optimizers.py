"""The optimizer: torch's fused AdamW, or one of timm's by name; and its state, whole."""

from typing import Any

import torch
from torch import Tensor, nn

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.sharding import gather_one, is_sharded, shard_like


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to gains, biases and the logit scale (as open_clip)."""
    return parameter.ndim >= 2 and "bias" not in name


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, with weight decay for `decays` parameters alone.

    Raises:
        TrainError: no such optimizer, or one of timm's with FSDP.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # Scalars, which FSDP leaves whole, are a group of their own: no kernel takes both kinds.
    kinds = [
        ([p for n, p in named if decays(n, p)], config.weight_decay),
        ([p for n, p in named if not decays(n, p) and p.ndim], 0.0),
        ([p for _, p in named if not p.ndim], 0.0),
    ]
    groups = [{"params": members, "weight_decay": decay} for members, decay in kinds if members]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        fused = named[0][1].device.type in ("cpu", "cuda", "xpu", "mps")
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    if any(is_sharded(p) for _, p in named):
        raise TrainError(f"--optimizer {config.optimizer}: with FSDP only adamw is supported")
    from timm import optim  # takes seconds

    timm: Any = optim
    names: list[str] = timm.list_optimizers()
    if config.optimizer not in names:
        known = ", ".join(["adamw", *names])
        raise TrainError(f"--optimizer {config.optimizer}: no such optimizer; known: {known}")
    info = timm.get_optimizer_info(config.optimizer)
    options: dict[str, Any] = {"eps": config.eps} if info.has_eps else {}
    if info.has_betas and info.num_betas == 2:
        options["betas"] = betas
    return timm.create_optimizer_v2(groups, config.optimizer, lr=config.lr, **options)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be skipped by a tensor, which nobody on the CPU has to read."""
    groups = optimizer.param_groups
    plain = not any(is_sharded(p) for group in groups for p in group["params"])
    return plain and isinstance(optimizer, torch.optim.AdamW) and bool(groups[0]["fused"])


def whole_state(optimizer: torch.optim.Optimizer, *, main: bool) -> dict[str, Any]:
    """The optimizer's state dict without shards, as `gather_one`; every process must call it."""
    state = optimizer.state_dict()
    state["state"] = {
        number: {n: gather_one(v, main) if isinstance(v, Tensor) else v for n, v in values.items()}
        for number, values in state["state"].items()
    }
    return state


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up what `whole_state` gave, sharded as the parameters are now.

    The settings are those of this run: --rebase may have changed them.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        for name, value in values.items():
            if is_sharded(parameter) and getattr(value, "shape", None) == parameter.shape:
                values[name] = shard_like(value, parameter)
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved |= {k: group[k] for k in ("weight_decay", "betas", "eps") if k in group}
    optimizer.load_state_dict(state)
