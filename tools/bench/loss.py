"""The losses, forward and backward: seconds and extra memory, ours against open_clip's.

uv run tools/bench/loss.py                       32,768 pairs, and the paper's 88,064 on our side
uv run tools/bench/loss.py --device cuda

open_clip's ClipLoss takes some 17 GiB at 32,768 pairs. Extra memory is the peak
beyond the features, gradients of the features included. On a CPU it is the process's largest
resident size, measured in a process of its own for each figure: what one side has used before
would hide what the next one needs, and the allocator keeps what it has freed.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from clip_models import ContrastiveLoss, SigmoidLoss
from interleaved import compare
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

LOSSES: dict[tuple[str, str], Callable[[], torch.nn.Module]] = {
    ("contrastive", "ours"): ContrastiveLoss,
    ("contrastive", "open_clip"): ClipLoss,
    ("sigmoid", "ours"): SigmoidLoss,
    ("sigmoid", "open_clip"): SigLipLoss,
}
SCALARS = {"contrastive": (100.0, 0.0), "sigmoid": (10.0, -10.0)}  # trained CLIP, fresh SigLIP


class Setting(NamedTuple):
    """What a loss is measured on."""

    kind: str
    rows: int
    width: int
    device: str
    threads: int
    seed: int


def leaves(setting: Setting) -> list[Tensor]:
    """Random features of length 1, scale and bias; made in place, so that no peak is left."""
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    shape = setting.rows, setting.width
    image, text = (torch.randn(shape, generator=generator, device=setting.device) for _ in range(2))
    for features in (image, text):
        for part in features.split(1024):
            part.div_(part.norm(dim=1, keepdim=True))
    scalars = [torch.tensor(value, device=setting.device) for value in SCALARS[setting.kind]]
    return [t.requires_grad_() for t in (image, text, *scalars)]


def step(side: str, kind: str, tensors: list[Tensor]) -> Tensor:
    """The loss and its gradients, as a training step leaves them."""
    for tensor in tensors:
        tensor.grad = None
    value = LOSSES[kind, side]()(*tensors)
    value.backward()
    return value.detach()


def extra_bytes(side: str, setting: Setting) -> int:
    """Peak memory of one step beyond the features. To be called in a fresh process."""
    torch.set_num_threads(setting.threads)
    step(side, setting.kind, leaves(setting._replace(rows=64)))  # libraries, thread pools
    tensors = leaves(setting)
    before = _resident("VmRSS", setting.device)
    step(side, setting.kind, tensors)
    return _resident("VmHWM", setting.device) - before


def _resident(field: str, device: str) -> int:
    """Bytes of this process now (VmRSS) or at most so far (VmHWM)."""
    if device == "cuda":
        torch.cuda.synchronize()
        used = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
        return used[field == "VmHWM"]()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise click.ClickException(f"/proc/self/status tells no {field}")


def measure(setting: Setting, sides: list[str]) -> dict[str, Any]:
    """Extra memory of the sides in MiB, and how many times less the first one takes."""
    context = get_context("spawn")
    found: dict[str, Any] = {}
    for side in sides:
        with ProcessPoolExecutor(1, context) as fresh:
            found[side] = round(fresh.submit(extra_bytes, side, setting).result() / 2**20, 1)
        click.echo(f"{setting.kind}, {setting.rows} rows, {side}: {found[side]} MiB", err=True)
    if len(sides) > 1:
        found["ratio"] = found[sides[1]] / found[sides[0]]
    return found


def compare_losses(setting: Setting, rounds: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both sides in turn, on the same tensors."""
    tensors = leaves(setting)
    ours, theirs = (float(step(side, setting.kind, tensors)) for side in ("ours", "open_clip"))
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        raise click.ClickException(f"the sides do not do the same: {ours} and {theirs}")
    return compare(
        {side: lambda s=side: step(s, setting.kind, tensors) for side in ("ours", "open_clip")},
        rounds=rounds,
        warmup=0,  # the comparison above
        work=setting.rows,
        unit="pairs",
        arguments=arguments,
    )


@click.command()
@click.option("--rows", default=32768, show_default=True, help="Pairs, contrastive loss.")
@click.option("--large-rows", default=88064, show_default=True, help="Memory of ours; 0: none.")
@click.option("--sigmoid-rows", default=8192, show_default=True, help="Pairs, sigmoid loss.")
@click.option("--width", default=512, show_default=True, help="Of the features, float32.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=2, show_default=True, help="Of torch, on a CPU.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
@click.option("--seed", default=0, show_default=True, help="Of the features.")
def main(
    rows: int,
    large_rows: int,
    sigmoid_rows: int,
    width: int,
    device: str,
    threads: int,
    rounds: int,
    seed: int,
) -> None:
    """Time and weigh the losses: ours against open_clip's, on the same features."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    report: dict[str, Any] = {}
    for kind, pairs in (("contrastive", rows), ("sigmoid", sigmoid_rows)):
        setting = Setting(kind, pairs, width, device, threads, seed)
        memory = measure(setting, ["ours", "open_clip"])
        report[kind] = compare_losses(setting, rounds, arguments) | {"extra_mib": memory}
    if large_rows:
        setting = Setting("contrastive", large_rows, width, device, threads, seed)
        report["large"] = {"rows": large_rows, "extra_mib": measure(setting, ["ours"])}
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
