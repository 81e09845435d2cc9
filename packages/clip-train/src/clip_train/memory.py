"""What a training step keeps in memory, found by running it on tensors that have no memory."""

from contextlib import nullcontext
from typing import Any

import torch
from clip_models import CLIP, ModelConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


def activation_bytes(
    towers: ModelConfig, pairs: int, autocast: torch.dtype | None, *, grad_checkpointing: bool
) -> int:
    """Bytes that a forward pass of `pairs` leaves for the backward pass, on one device.

    Of the tensors autograd saves, all but the weights; with their copies in half precision.
    Captions count as if padded, so a batch of short ones takes less. With checkpointing, blocks
    save their inputs; the one that is being recomputed is not counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler: seconds

    def name_of(storage: torch.UntypedStorage) -> int:
        return StorageWeakRef(storage).cdata

    size, length = towers.vision_cfg.image_size, towers.text_cfg.context_length
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # timm towers convert themselves to another memory format, which fake tensors do not allow
    with nullcontext() if towers.vision_cfg.timm_model_name else mode:
        model: Any = CLIP(towers).train()
    with mode:
        model.text.fast = False  # packing asks for the captions' lengths
        model.set_grad_checkpointing(grad_checkpointing)
        weights = {name_of(p.untyped_storage()) for p in model.parameters()}
        saved: dict[int, Any] = {}  # holds the storages: an address must not serve twice

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if name_of(storage) not in weights:
                saved[name_of(storage)] = storage
            return tensor

        def keep_input(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
            keep(inputs[0])

        if grad_checkpointing:
            for members in model.modules():
                for block in members if isinstance(members, nn.ModuleList) else ():
                    block.register_forward_pre_hook(keep_input)
        enabled = autocast is not None
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", autocast or torch.bfloat16, enabled=enabled),
        ):
            tokens = torch.zeros(pairs, length, dtype=torch.int64)
            _features = model(torch.empty(pairs, 3, size, size), tokens)
            return sum(storage.nbytes() for storage in saved.values())
