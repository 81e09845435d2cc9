"""The memory that --dry-run tells, beside what a real forward pass saves."""

from typing import Any

import pytest
import torch
from clip_models import CLIP, ModelConfig, architecture
from clip_train.memory import activation_bytes
from torch.autograd.graph import saved_tensors_hooks

RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg"},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 16},
}


def saved_bytes(towers: ModelConfig, pairs: int, autocast: torch.dtype | None) -> int:
    """Bytes of the distinct storages a real forward pass holds on to."""
    model: Any = CLIP(towers).train()
    model.text.fast = False
    weights = {p.data_ptr() for p in model.parameters()}
    held: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    size, length = towers.vision_cfg.image_size, towers.text_cfg.context_length
    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        output = model(torch.rand(pairs, 3, size, size), torch.ones(pairs, length).long())
    assert output.image_features_BE.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["XS", "resnet"])
def test_bytes_are_those_of_a_real_pass(name: str, autocast: torch.dtype | None) -> None:
    towers = architecture("XS") if name == "XS" else ModelConfig.from_dict(RESNET)
    found = activation_bytes(towers, 8, autocast, grad_checkpointing=False)
    assert found == pytest.approx(saved_bytes(towers, 8, autocast), rel=0.03)


def test_checkpointing_keeps_the_inputs_of_blocks() -> None:
    towers = architecture("ViT-B-32")
    found = activation_bytes(towers, 16, None, grad_checkpointing=True)
    images, texts = 50 * 768 * 11, 77 * 512 * 11  # floats a pair, all blocks but the last
    least = 4 * 16 * (images + texts)
    assert least < found < 2 * least
    assert found < activation_bytes(towers, 16, None, grad_checkpointing=False) / 5
