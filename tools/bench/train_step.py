"""A full training step: clip-train's own against the one of open_clip's trainer.

uv run tools/bench/train_step.py                                        ViT-B-32, batch 16, fp32
uv run tools/bench/train_step.py --precision bf16                       the same under autocast
uv run tools/bench/train_step.py --architecture Ti --batch-size 128     a small model: width 192,
                                                                        6 + 6 layers, 64 pixels

Same weights, images and captions on both sides, which must find the same losses before they are
timed. A step is all of it: transfer, forward, loss, backward, AdamW, clamp of the logit scale.
"""

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import clip_models
import open_clip
import torch
from clip_models import CLIP, Preprocess, save_model
from clip_train.config import TrainConfig
from clip_train.optimizers import make_optimizer
from clip_train.step import MAX_LOGIT_SCALE, Stepper
from interleaved import compare
from open_clip.loss import ClipLoss
from torch import Tensor

Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Tensor]
LEARNING_RATE = 1e-5


def captions(count: int, vocabulary: int, length: int, seed: int) -> Tensor:
    """Random token ids [count, length] as LAION's captions are long.

    Log-normal with a mean of 18 tokens, start and end included, cut to 4..length.
    """
    generator = torch.Generator().manual_seed(seed)
    sigma = 0.6
    mean_of_log = math.log(18) - sigma**2 / 2
    drawn = torch.exp(mean_of_log + sigma * torch.randn(count, generator=generator))
    tokens = torch.randint(1, vocabulary - 2, (count, length), generator=generator)
    last = drawn.round().long().clamp(4, length).unsqueeze(1) - 1
    position = torch.arange(length)
    tokens[:, 0] = vocabulary - 2
    tokens = torch.where(position == last, vocabulary - 1, tokens)
    return torch.where(position > last, 0, tokens)


def our_step(model: CLIP, bf16: bool, batch_size: int) -> Step:
    """clip-train's step."""
    config = TrainConfig(
        model="", train_data="", output=Path(), samples_seen=batch_size, batch_size=batch_size,
        lr=LEARNING_RATE, warmup=0,
    )  # fmt: skip
    optimizer = make_optimizer(model, config)
    autocast = torch.bfloat16 if bf16 else None
    stepper = Stepper(
        model, model, optimizer, config, normalize=lambda pixels: pixels, autocast=autocast
    )

    def step(images: Tensor, tokens: Tensor) -> Tensor:
        images = images.to(stepper.device, non_blocking=True)
        return stepper.step(images, tokens, lr=LEARNING_RATE, seed=0).loss

    return step


def their_step(model: Any, device: str, bf16: bool) -> Step:
    """open_clip_train's step: optimizer as in its main.py, the rest as in its train.py."""
    named = list(model.named_parameters())
    words = ("bn", "ln", "bias", "logit_scale")
    gains = [p for n, p in named if p.ndim < 2 or any(word in n for word in words)]
    chosen = {id(p) for p in gains}
    groups = [
        {"params": gains, "weight_decay": 0.0},
        {"params": [p for _, p in named if id(p) not in chosen], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
    loss = ClipLoss(cache_labels=True)

    def step(images: Tensor, tokens: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        tokens = tokens.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            losses = loss(**model(images, tokens), output_dict=True)
            total = sum(losses.values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return total.detach()

    return step


@click.command()
@click.option("--architecture", default="ViT-B-32", show_default=True, help="The model.")
@click.option("--batch-size", default=16, show_default=True, help="Pairs in a step.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16: autocast, as either trainer does it.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=2, show_default=True, help="Of torch, on a CPU.")
@click.option("--steps", default=4, show_default=True, help="Steps, each of its own batch, a call.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
@click.option("--seed", default=0, show_default=True, help="Of weights, images and captions.")
def main(
    architecture: str,
    batch_size: int,
    precision: str,
    device: str,
    threads: int,
    steps: int,
    rounds: int,
    seed: int,
) -> None:
    """Time full training steps: ours against open_clip's, on the same weights and batches."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config = clip_models.architecture(architecture)
    model = CLIP(config).train()
    size, text = config.vision_cfg.image_size, config.text_cfg
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", model, Preprocess(size))
        theirs = open_clip.create_model(f"local-dir:{folder}/model", output_dict=True).train()
    model, theirs = model.to(device), theirs.to(device)

    tokens = captions(steps * batch_size, text.vocab_size, text.context_length, seed)
    images = torch.randn(steps * batch_size, 3, size, size)
    if device == "cuda":
        images, tokens = images.pin_memory(), tokens.pin_memory()
    batches = list(zip(images.split(batch_size), tokens.split(batch_size), strict=True))
    bf16 = precision == "bf16"
    step_ours = our_step(model, bf16, batch_size)
    step_theirs = their_step(theirs, device, bf16)

    # These steps warm up as well. The second loss depends on the first step's gradients and update.
    found = [(step_ours(*b), step_theirs(*b)) for b in (batches * 2)[: max(2, steps)]]
    losses = [(float(mine), float(other)) for mine, other in found[:2]]
    for (mine, other), tolerance in zip(losses, (1e-4, 1e-3), strict=True):
        if not math.isclose(mine, other, rel_tol=2e-2 if bf16 else tolerance):
            raise click.ClickException(f"the sides do not do the same: losses {losses}")
    report = compare(
        {
            "ours": lambda: [step_ours(*batch) for batch in batches],
            "open_clip": lambda: [step_theirs(*batch) for batch in batches],
        },
        rounds=rounds,
        warmup=0,
        work=steps * batch_size,
        unit="samples",
        arguments=arguments,
    )
    lengths = tokens.argmax(dim=1) + 1
    report["first_losses"] = {"ours": [a for a, _ in losses], "open_clip": [b for _, b in losses]}
    report["caption_tokens"] = {"mean": float(lengths.float().mean()), "max": int(lengths.max())}
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
