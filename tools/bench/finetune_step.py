"""A fine-tuning step: clip-finetune's own against WiSE-FT's loop in open_clip's image tower.

uv run tools/bench/finetune_step.py                            ViT-B-32, batch 32, 1,000 classes
uv run tools/bench/finetune_step.py --precision bf16
uv run tools/bench/finetune_step.py --method frozen-head       the head stays (patching)

Same weights, images, labels and settings on both sides, which must find the same losses before they
are timed. A step is all of it: transfer, forward, loss, backward, clipping, AdamW. Ours also makes
float pixels of bytes, which the other's loader has done by then.
"""

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click
import clip_models
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from clip_finetune import LabelledSet
from clip_finetune.batches import Batch
from clip_finetune.config import TrainConfig
from clip_finetune.loop import Trainer
from clip_finetune.state import TrainState
from clip_finetune.tasks import Task
from clip_models import CLIP, Head, Preprocess, fingerprint_of, save_model
from interleaved import compare
from torch import Tensor, nn

LEARNING_RATE = 3e-5


def our_step(model: Path, head: Head, config: TrainConfig, device: str) -> Callable[[Batch], float]:
    """The step of a run on this model, as `clip-finetune train` takes it."""
    nothing = np.zeros(0, dtype=np.int64)
    data = LabelledSet(Path("task"), "train", head.class_names, (), (), *[nothing] * 4)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    trainer = Trainer(
        model, config, [Task(data, "start", head)], accelerator, TrainState(model, {})
    )
    return lambda batch: trainer.update(batch, False)[0]["loss"]


def their_step(
    model: Path, head: Head, config: TrainConfig, device: str
) -> Callable[[Tensor, Tensor], float]:
    """WiSE-FT's `finetune`: one AdamW group, its schedule's first rate, clipping at 1."""
    visual = open_clip.create_model(f"local-dir:{model}").visual.to(device).train()
    linear = nn.Linear(head.weight.shape[1], len(head.bias)).to(device)
    linear.load_state_dict({"weight": head.weight, "bias": head.bias})
    linear.requires_grad_(config.method == "end-to-end")
    parameters = [p for p in [*visual.parameters(), *linear.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    bf16 = config.precision == "bf16"

    def step(images: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad()
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            features = visual(images)
        features = features.float()
        loss = F.cross_entropy(linear(features / features.norm(dim=-1, keepdim=True)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        return loss.item()

    return step


@click.command()
@click.option("--architecture", default="ViT-B-32", show_default=True, help="The model.")
@click.option("--batch-size", default=32, show_default=True, help="Images in a step.")
@click.option("--classes", default=1000, show_default=True, help="Of the head.")
@click.option(
    "--method",
    type=click.Choice(["end-to-end", "frozen-head"]),
    default="end-to-end",
    show_default=True,
    help="Whether the head learns.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16: autocast of the image tower.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=2, show_default=True, help="Of torch, on a CPU.")
@click.option("--steps", default=2, show_default=True, help="Steps, each of its own batch, a call.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
@click.option("--seed", default=0, show_default=True, help="Of weights and images.")
def main(
    architecture: str,
    batch_size: int,
    classes: int,
    method: str,
    precision: str,
    device: str,
    threads: int,
    steps: int,
    rounds: int,
    seed: int,
) -> None:
    """Time full fine-tuning steps, once both sides find the same losses."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    towers = clip_models.architecture(architecture)
    preprocess = Preprocess(towers.vision_cfg.image_size)
    settings = {"method": method, "precision": precision, "batch_size": batch_size}
    config = TrainConfig(
        task=(Path("task"),), iterations=10**9, warmup=0, lr=LEARNING_RATE, **settings
    )  # so long a cosine stays at its first rate
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model, CLIP(towers), preprocess)
        head = Head(
            weight=14 * F.normalize(torch.randn(classes, towers.embed_dim), dim=-1),
            bias=torch.zeros(classes),
            class_names=tuple(map(str, range(classes))),
            kind="zero-shot",
            feature="post",
            fingerprint=fingerprint_of(model),
        )
        ours = our_step(model, head, config, device)
        theirs = their_step(model, head, config, device)
    shape = (steps, batch_size, 3, preprocess.size, preprocess.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels = torch.randint(0, classes, (steps, batch_size))
    batches = [Batch(0, i, y, y, 0) for i, y in zip(images, labels, strict=True)]
    pairs = [(preprocess.normalize(b.images), b.labels) for b in batches]

    # These steps warm up as well. Later losses depend on the first steps' gradients and updates.
    found = [(ours(b), theirs(*p)) for b, p in list(zip(batches, pairs, strict=True)) * 2]
    tolerance = 2e-2 if precision == "bf16" else 1e-3
    if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in found):
        raise click.ClickException(f"the sides do not do the same: losses {found}")
    report = compare(
        {
            "ours": lambda: [ours(batch) for batch in batches],
            "open_clip": lambda: [theirs(*pair) for pair in pairs],
        },
        rounds=rounds,
        warmup=0,
        work=steps * batch_size,
        unit="images",
        arguments=arguments,
    )
    click.echo(json.dumps({**report, "first_losses": found[:2]}))


if __name__ == "__main__":
    main()
