"""Towers on a GPU: a pretended one, which finds tensors left on the CPU, and a real one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from clip_models import CLIP, ContrastiveLoss, SigmoidLoss, Tokenizer
from clip_models.transformer import Packed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from .conftest import CAPTIONS, inputs, scattered, small_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@contextmanager
def pretended_cuda(kind: str, dtype: torch.dtype) -> Iterator[CLIP]:
    """A model on a cuda device that is not there: shapes and devices are real, values are not.

    Caption lengths are values, so the captions are laid out before.
    """
    tower = scattered(small_config(kind)).text
    tokens, positions, layout, order = tower._lay_out(Tokenizer()(CAPTIONS))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def cuda(x: Tensor) -> Tensor:
            return mode.from_tensor(x).to("cuda")

        moved = replace(layout, pooled_S=cuda(layout.pooled_S))
        if isinstance(moved, Packed):
            moved = replace(moved, bounds_S1=cuda(moved.bounds_S1))
        order = None if order is None else cuda(order)
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                model = CLIP(small_config(kind)).train()
        finally:
            torch.set_default_dtype(torch.float32)
        laid_out = (cuda(tokens), cuda(positions), moved, order)
        with patch.object(model.text, "_lay_out", lambda _: laid_out):
            yield model


@pytest.mark.parametrize("kind", ["vit", "vit-eos", "vit-clipa", "vit-siglip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_stays_behind(kind: str, dtype: torch.dtype) -> None:
    with pretended_cuda(kind, dtype) as model:
        config = replace(model.config.vision_cfg, patch_dropout=0.5)
        model.visual.config = config
        images = torch.empty(len(CAPTIONS), 3, 64, 64, device="cuda", dtype=dtype)
        tokens = Tokenizer()(CAPTIONS)
        calls: list[int] = []
        real = varlen.varlen_attn

        def counted(*args: Tensor, **options: object) -> object:
            calls.append(len(args[0]))
            return real(*args, **options)  # pyright: ignore

        with (
            patch.object(varlen, "varlen_attn", counted),
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),  # cuDNN asks the device
        ):
            output = model(images, tokens)
        assert all(x.device.type == "cuda" for x in output if x is not None)
        layers = model.config.text_cfg.layers
        packed = dtype == torch.bfloat16 and not model.config.text_cfg.no_causal_mask
        assert len(calls) == (layers if packed else 0)
        for loss in (ContrastiveLoss(), SigmoidLoss()):
            bias = model.logit_scale if output.logit_bias is None else output.logit_bias
            assert loss(*output[:3], bias).device.type == "cuda"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["vit", "vit-siglip", "vit-avg", "timm", "timm-siglip"])
def test_gpu_gives_the_cpus_features(kind: str) -> None:
    model = scattered(small_config(kind))
    images, tokens = inputs(model.config)
    with torch.no_grad():
        expected = model(images, tokens)
        model.cuda()
        exact = model(images.cuda(), tokens)
        with torch.autocast("cuda", torch.bfloat16):
            half = model(images.cuda(), tokens)
    for a, b, c in zip(expected[:2], exact[:2], half[:2], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(c.float().cpu(), a, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@needs_gpu
def test_varlen_attention_gives_the_plain_gradients() -> None:
    def gradients(fast: bool) -> list[Tensor]:
        model = scattered(small_config("vit")).cuda().train()
        model.text.fast = fast
        images, tokens = inputs(model.config)
        with torch.autocast("cuda", torch.bfloat16):
            output = model(images.cuda(), tokens)
        ContrastiveLoss()(*output).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for fast, plain in zip(gradients(True), gradients(False), strict=True):
        cosine = torch.nn.functional.cosine_similarity(fast.flatten(), plain.flatten(), dim=0)
        assert cosine > 0.99


@pytest.mark.gpu
@needs_gpu
def test_compiled_text_tower_has_one_graph_on_a_gpu() -> None:
    """Varlen attention is traced: only the layout of the captions stays outside."""
    model = scattered(small_config("vit")).cuda().text
    tokens = Tokenizer()(CAPTIONS)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(
            torch.compile(model)(tokens).float(), model(tokens).float(), rtol=0.05, atol=0.05
        )
