"""The tiled losses against open_clip's, on one process and on several."""

import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from clip_models import ContrastiveLoss, ModelError, SigmoidLoss, loss
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GLOBAL_ROWS = 24
PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "contrastive": (ContrastiveLoss, ClipLoss),
    "sigmoid": (SigmoidLoss, SigLipLoss),
}
KINDS = pytest.mark.parametrize("kind", PAIRS)


def features(
    rows: int, dtype: torch.dtype = torch.float64, width: int = 24, scale: float = 30.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=-1)
        for _ in range(2)
    )
    scalars = torch.tensor(scale, dtype=dtype), torch.tensor(-3.0, dtype=dtype)
    image, text, scale_, bias = (t.requires_grad_() for t in (image, text, *scalars))
    return image, text, scale_, bias


def clustered(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits from -100 to 100, some rows and columns of a tile all far below its largest."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.where(torch.arange(rows) % 3 == 0, -1.0, 1.0)[:, None]
    base = torch.randn(24, generator=generator)
    image = base + 0.1 * torch.randn(rows, 24, generator=generator)
    text = signs * (base + 0.1 * torch.randn(rows, 24, generator=generator))
    image[1::4] *= -1
    image[2::4] = torch.randn(len(image[2::4]), 24, generator=generator)
    leaves = F.normalize(image, dim=-1), F.normalize(text, dim=-1), torch.tensor(100.0)
    image, text, scale, bias = (t.requires_grad_() for t in (*leaves, torch.tensor(-10.0)))
    return image, text, scale, bias


def value_and_gradients(module: nn.Module, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    value = module(*leaves)
    return [value.detach(), *torch.autograd.grad(3 * value, leaves)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@KINDS
@pytest.mark.parametrize(
    ("rows", "tile"), [(1, 16), (30, 7 * 11), (31, 8 * 8), (30, 1), (30, 4096)]
)
def test_value_and_gradients_equal_open_clip(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, tile: int
) -> None:
    monkeypatch.setattr(loss, "CPU_TILE_BYTES", 8 * tile)
    ours, theirs = PAIRS[kind]
    leaves = features(rows)
    assert_equal(value_and_gradients(ours(), leaves), value_and_gradients(theirs(), leaves))


@KINDS
@pytest.mark.parametrize("max_spread", [loss.MAX_SPREAD, -1.0], ids=["one exp", "as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_where_float32_underflows(
    monkeypatch: pytest.MonkeyPatch, kind: str, max_spread: float, dtype: torch.dtype
) -> None:
    """Scale 100, opposite features: exp(-200) is 0 in float32, and no lse may be log(0)."""
    monkeypatch.setattr(loss, "MAX_SPREAD", max_spread)
    monkeypatch.setattr(loss, "CPU_TILE_BYTES", dtype.itemsize * 100)
    ours, theirs = PAIRS[kind]
    leaves = clustered(61)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    cast = tuple(leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    logits = 100 * exact[0] @ exact[1].T
    assert logits.max() - logits.min() > 190
    expected = value_and_gradients(theirs(), exact)
    got = [t.double() for t in value_and_gradients(ours(), cast)]
    assert_equal(got, expected, 1e-12 if dtype == torch.float64 else 2e-5)


@KINDS
def test_one_exp_of_a_wide_tile_is_exact_in_float32(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Rows and columns of a tile that lie almost MAX_SPREAD below its largest logit."""
    spreads: list[float] = []
    original = loss._common_shift

    def record(logits: Tensor) -> Tensor | None:
        shift = original(logits)
        assert shift is not None
        spreads.append(float(shift - logits.min()))
        return shift

    monkeypatch.setattr(loss, "_common_shift", record)
    ours, theirs = PAIRS[kind]
    image, text, _, bias = clustered(61)
    leaves = image, text, torch.tensor(39.5, requires_grad=True), bias
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    got = [t.double() for t in value_and_gradients(ours(), leaves)]
    assert_equal(got, value_and_gradients(theirs(), exact), 2e-5)
    assert kind == "sigmoid" or max(spreads) > 75


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max(self.largest, *made, 0)
        return result


@KINDS
def test_memory_is_linear_in_the_batch(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No tensor is larger than the features, forward or backward."""
    monkeypatch.setattr(loss, "CPU_TILE_BYTES", 8 * 4096)
    leaves = features(2000)
    with LargestTensor() as seen:
        value_and_gradients(PAIRS[kind][0](), leaves)
    assert seen.largest == leaves[0].numel()


@KINDS
def test_gradcheck(kind: str) -> None:
    ours, _ = PAIRS[kind]
    assert torch.autograd.gradcheck(ours(), features(9, scale=5.0))


@KINDS
def test_logits_are_float32_under_autocast(kind: str) -> None:
    module = PAIRS[kind][0]()
    leaves = features(64, torch.float32)
    exact = value_and_gradients(module, leaves)
    image, text, scale, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(value_and_gradients(module, leaves), exact, strict=True):
            assert torch.equal(a, b)
        half = module(image.bfloat16(), text.bfloat16(), scale, bias)
    assert half.dtype == torch.float32
    rounded = module(image.bfloat16().float(), text.bfloat16().float(), scale, bias)
    assert torch.equal(half, rounded)
    gradient = torch.autograd.grad(half, image)[0]
    assert gradient.dtype == torch.float32
    assert torch.isfinite(gradient).all()


@KINDS
def test_without_bias_and_without_gradients(kind: str) -> None:
    ours, theirs = PAIRS[kind]
    image, text, scale, _ = features(8)
    expected = theirs()(image, text, scale, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(ours()(image, text, scale), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        value = ours()(image, text, scale)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)


@KINDS
def test_backward_twice_and_scale_of_shape_one(kind: str) -> None:
    image, text, scale, bias = features(8)
    value = PAIRS[kind][0]()(image, text, scale.reshape(1), bias)
    first = torch.autograd.grad(value, (image, text, scale, bias), retain_graph=True)
    second = torch.autograd.grad(value, (image, text, scale, bias))
    assert value.ndim == 0
    assert_equal(list(first), list(second), 0)


@KINDS
def test_under_compile(kind: str) -> None:
    """A graph break, not a graph of thousands of tiles: the towers around it compile."""
    module = PAIRS[kind][0]()

    def step(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return 2 * module(F.normalize(image * 2, dim=-1), text, scale, bias)

    leaves = features(8)
    compiled = torch.compile(step, backend="aot_eager")
    assert_equal(
        [*torch.autograd.grad(compiled(*leaves), leaves)],
        [*torch.autograd.grad(step(*leaves), leaves)],
    )


@KINDS
def test_errors(kind: str) -> None:
    ours, _ = PAIRS[kind]
    image, text, scale, bias = features(6)
    with pytest.raises(ModelError, match=r"image features are \[6, 24\] and text .*\[5, 24\]"):
        ours()(image, text[:5], scale, bias)
    with pytest.raises(ModelError, match=r"\[6, 24\] and text features \[6, 23\]; expected the sa"):
        ours()(image, text[:, :23], scale, bias)
    with pytest.raises(ModelError, match="with a row or more"):
        ours()(image[:0], text[:0], scale, bias)
    with pytest.raises(ModelError, match="'both'; expected None, 'gather' or 'ring'"):
        ours("both")
    with pytest.raises(ModelError, match="'ring' without a process group; call"):
        ours("ring")(image, text, scale, bias)


def _open_clips(kind: str, form: str, rank: int, world: int) -> nn.Module:
    if kind == "contrastive":
        return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return SigLipLoss(rank=rank, world_size=world, dist_impl={"ring": "bidir"}.get(form, form))


def _rank(rank: int, world: int, backend: str, folder: Path) -> None:
    """Save [value, gradients] of each loss and form, and open_clip's value on this rank."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{folder}/rendezvous", rank=rank, world_size=world)
    loss.CPU_TILE_BYTES = loss.GPU_TILE_BYTES = 8 * 15
    leaves = tuple(t.detach().to(device).requires_grad_() for t in features(GLOBAL_ROWS))
    mine = slice(rank * GLOBAL_ROWS // world, (rank + 1) * GLOBAL_ROWS // world)
    own = leaves[0][mine], leaves[1][mine], leaves[2], leaves[3]
    results: dict[str, list[Tensor]] = {}
    for kind, (ours, _) in PAIRS.items():
        for form in ("gather", "ring"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                value = ours(form)(*own)
                gradients = torch.autograd.grad(3 * value, leaves)
            theirs = _open_clips(kind, form, rank, world)(*own)
            torch.testing.assert_close(value, theirs, rtol=1e-12, atol=1e-12)
            results[f"{kind} {form}"] = [t.detach().cpu() for t in (value, *gradients)]
    unequal = leaves[0][: 2 + rank]
    with pytest.raises(ModelError, match=r"features of ranks 0 to .* are \[\(2, 24\), \(3, 24\)"):
        ContrastiveLoss("ring")(unequal, unequal, leaves[2])
    dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _check_ranks(world: int, backend: str, folder: Path) -> None:
    """As DDP averages them: value and gradients of one process with the whole batch."""
    # One server imports torch and open_clip, once for all tests, and forks the ranks.
    multiprocessing.set_forkserver_preload(["open_clip.loss", "clip_models.loss", "pytest"])
    mp.start_processes(_rank, (world, backend, folder), world, start_method="forkserver")
    ranks = [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world)]
    for kind, (_, theirs) in PAIRS.items():
        whole = value_and_gradients(theirs(), features(GLOBAL_ROWS))
        for form in ("gather", "ring"):
            parts = [rank[f"{kind} {form}"] for rank in ranks]
            assert_equal([sum(p) / world for p in zip(*parts, strict=True)], whole)


@KINDS
@pytest.mark.parametrize("form", ["gather", "ring"])
def test_a_group_of_one_process(tmp_path: Path, kind: str, form: str) -> None:
    ours, theirs = PAIRS[kind]
    leaves = features(10)
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        found = value_and_gradients(ours(form), leaves)
    finally:
        dist.destroy_process_group()
    assert_equal(found, value_and_gradients(theirs(), leaves))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_average_to_the_global_batch(tmp_path: Path, world: int) -> None:
    _check_ranks(world, "gloo", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_average_to_the_global_batch_on_gpus(tmp_path: Path) -> None:
    _check_ranks(2, "nccl", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@KINDS
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Float64 as open_clip; bfloat16 features under autocast, in small tiles, as on a CPU."""
    ours, theirs = PAIRS[kind]

    def on_gpu(leaves: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(leaf.detach().to("cuda", dtype).requires_grad_() for leaf in leaves)

    leaves = on_gpu(features(301), torch.float64)
    assert_equal(value_and_gradients(ours(), leaves), value_and_gradients(theirs(), leaves))
    monkeypatch.setattr(loss, "GPU_TILE_BYTES", 4 * 77 * 77)
    half = tuple(leaf.detach().bfloat16() for leaf in features(301, torch.float32))
    expected = value_and_gradients(ours(), on_gpu(tuple(t.cpu() for t in half), torch.float64))
    leaves = on_gpu(half, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        value = ours()(*leaves)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(3 * value, leaves)
    for a, b in zip(gradients, expected[1:], strict=True):  # rounded to bfloat16 at the end
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-4)
