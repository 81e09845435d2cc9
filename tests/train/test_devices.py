"""Steps on a GPU: a pretended one, which finds tensors left on the CPU, and a real one."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from clip_models import CLIP, Tokenizer, architecture
from clip_train import metrics
from clip_train.ema import Ema
from clip_train.initial import with_patch_dropout
from clip_train.optimizers import make_optimizer
from clip_train.step import Stepper
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from .conftest import arguments, run
from .test_step import config

CAPTIONS = ["a dog", "two cats on a mat", "a red house by the sea"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # so the towers stay in float32
def test_no_tensor_stays_behind(autocast: torch.dtype | None) -> None:
    """A step on a cuda device that is not there, tokens on the CPU as the loader gives them.

    Caption lengths are values, which pretended tensors lack: the captions are laid out before. And
    autograd's threads belong to real devices: gradients of nought stand in for the backward pass.
    """
    towers = with_patch_dropout(architecture("XS"), 0.5)
    tokens = Tokenizer()(CAPTIONS)
    laid_out = CLIP(towers).text._lay_out(tokens)
    settings = config(grad_clip=1.0, spike_factor=3.0, patch_dropout=0.5, ema=0.9)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def cuda(x: torch.Tensor) -> torch.Tensor:
            return mode.from_tensor(x).to("cuda")

        rows_T, positions_T, layout, order_B = laid_out
        bounds, pooled = cuda(layout.bounds_S1), cuda(layout.pooled_S)
        layout = replace(layout, bounds_S1=bounds, pooled_S=pooled)
        with torch.device("cuda"):
            model: Any = CLIP(
                replace(towers, vision_cfg=replace(towers.vision_cfg, patch_dropout=0.5))
            )
        optimizer = make_optimizer(model.train(), settings)
        stepper = Stepper(
            model, model, optimizer, settings, normalize=lambda x: x / 255, autocast=autocast
        )
        ema = Ema(model, 0.9)
        moved = (cuda(rows_T), cuda(positions_T), layout, cuda(order_B))
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # cuDNN asks the device

        def pretended_backward(loss: torch.Tensor) -> None:
            assert loss.device.type == "cuda"
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        with (
            patch.object(model.text, "_lay_out", lambda _: moved),
            patch.object(torch.Tensor, "backward", pretended_backward),
            sdpa_kernel(backends),
        ):
            images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8, device="cuda")
            update = stepper.step(images, tokens, lr=1e-3, seed=0)
        ema.update(1)
        found = [*vars(update).values(), *stepper.guard.state_dict().values()]
        found += [v for state in optimizer.state.values() for v in state.values()]
        found += ema.whole_state().values()
        assert {x.device.type for x in found} == {"cuda"}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_gpu_is_close_to_the_cpus(data: Path, tmp_path: Path, precision: str) -> None:
    settings: dict[str, object] = {"ema": 0.9, "samples_seen": 160}
    for device, changed in (
        ("gpu", {"precision": precision, "micro_batch_size": 3, "workers": 1}),
        ("cpu", {"precision": "fp32"}),
    ):
        command = ["clip-train", *arguments(data, tmp_path / device, **(settings | changed))]
        found = run(command, ACCELERATE_USE_CPU=str(device == "cpu").lower())
        assert found.returncode == 0, found.stderr
        assert f"on {'cuda' if device == 'gpu' else 'cpu'}" in found.stderr
    gpu, cpu = (metrics.read_rows(tmp_path / device) for device in ("gpu", "cpu"))
    for row, expected in zip(gpu, cpu, strict=True):
        assert row["order_hash"] == expected["order_hash"]
        if not gpu[-1]["skipped"]:  # fp16 may look for its scale first
            assert row["loss"] == pytest.approx(expected["loss"], abs=0.1)
