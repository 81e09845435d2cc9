"""The tiled loss against open_clip's, on one process and on several."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from clip_models import contrastive_loss, loss
from open_clip.loss import ClipLoss
from torch import Tensor


def features(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(rows, 24, generator=generator, dtype=dtype), dim=-1)
        for _ in range(2)
    )
    return (
        image.requires_grad_(),
        text.requires_grad_(),
        torch.tensor(30.0, dtype=dtype).requires_grad_(),
    )


@pytest.mark.parametrize(
    ("rows", "tile"), [(1, (4, 4)), (30, (7, 11)), (32, (8, 8)), (30, (64, 64))]
)
def test_value_and_gradients_equal_open_clip(
    monkeypatch: pytest.MonkeyPatch, rows: int, tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(loss, "TILE_ROWS", tile[0])
    monkeypatch.setattr(loss, "TILE_COLUMNS", tile[1])
    leaves = features(rows)
    theirs, ours = ClipLoss()(*leaves), contrastive_loss(*leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * theirs, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    leaves = features(9)
    assert torch.autograd.gradcheck(contrastive_loss, leaves)


def test_logits_are_float32_under_autocast() -> None:
    image, text, scale = features(64, torch.float32)
    exact = contrastive_loss(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, scale), exact)
        half = contrastive_loss(image.bfloat16(), text.bfloat16(), scale)
    assert half.dtype == torch.float32
    image_gradient = torch.autograd.grad(half, image)[0]
    assert image_gradient.dtype == torch.float32
    assert torch.isfinite(image_gradient).all()


def _rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    loss.TILE_ROWS, loss.TILE_COLUMNS = 3, 5
    image, text, scale = features(24)
    mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
    value = contrastive_loss(image[mine], text[mine], scale, gathered=True)
    gradients = torch.autograd.grad(value, (image, text, scale))
    dist.barrier()
    torch.save((value.detach(), *gradients), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_average_to_the_global_batch(tmp_path: Path, world: int) -> None:
    """As DDP averages them: value and gradients of one process with the whole batch."""
    mp.spawn(_rank, (world, tmp_path), nprocs=world)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    leaves = features(24)
    value = ClipLoss()(*leaves)
    expected = (value.detach(), *torch.autograd.grad(value, leaves))
    for parts, whole in zip(zip(*ranks, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(parts) / world, whole, rtol=1e-12, atol=1e-12)
