"""FSDP2: parameters, gradients and optimizer state in equal shards over the processes.

`accelerate config` says whether and how (its FSDP_* variables); torch's `fully_shard` does it. Not
Accelerate's `prepare`: it knows neither the scalar parameters of CLIP, nor the blocks that are
entered by another method than forward, nor processes on CPUs.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clip_train.errors import TrainError

# Importing these takes more than a second, which the runs that are not sharded need not wait for.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def fsdp_wanted() -> bool:
    """Whether Accelerate's configuration asks for FSDP.

    Raises:
        TrainError: for its first version.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainError("FSDP version 1 is not supported; expected fsdp_version: 2 (FSDP_VERSION)")
    return True


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard `model` in place: each block of a tower by itself, and what is left as one.

    The logit scale and bias, which have no dimension to shard, stay whole (`sync_scalars`).
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    plugin = FullyShardedDataParallelPlugin()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
    }
    for block in _blocks(model):
        fully_shard(block, **options)
        if hasattr(block, "pooled"):  # the last block may compute the pooled tokens alone
            register_fsdp_forward_method(block, "pooled")
    scalars = {p for p in model.parameters() if p.ndim == 0}
    options["reshard_after_forward"] = False  # the backward pass needs it at once
    fully_shard(model, **options, ignored_params=scalars)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost members of lists of modules: blocks, stages."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += [part for part in child if any(p.ndim for p in part.parameters())]
        else:
            found += _blocks(child)
    return found


def is_sharded(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether this process holds a shard of the tensor only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's shard, which shares its memory; the tensor itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; where it is sharded every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather_one(tensor: Tensor, main: bool) -> Tensor:
    """The whole tensor, from shards in the main process's CPU memory and empty in the others'.

    So that of all that is saved a device holds but one whole tensor at a time.
    """
    if not is_sharded(tensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if main else gathered.new_empty(0)


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as the reference is, on its device."""
    if not is_sharded(reference):
        return tensor.to(reference.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(tensor.to(reference.device), mesh, placements, src_data_rank=None)


def sync_scalars(model: nn.Module) -> None:
    """Average the gradients of parameters that are not sharded over the processes."""
    for parameter in model.parameters():
        if parameter.grad is not None and not is_sharded(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def scale(tensors: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply all in place, each process its shards."""
    shards = [local(tensor) for tensor in tensors]
    torch._foreach_mul_(shards, factor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage], as torch's own clipping
