"""A zero-shot head from 80 prompts a class: `build_head` against open_clip's classifier.

uv run tools/bench/zero_shot_head.py        ViT-B-32 of random weights, fp32, 20 of ImageNet's names
"""

import json
import tempfile
from pathlib import Path

import click
import clip_models
import open_clip
import torch
from clip_models import CLIP, Preprocess, build_head, load_model, save_model
from interleaved import compare
from torch import Tensor


@click.command()
@click.option("--architecture", default="ViT-B-32", show_default=True, help="The model.")
@click.option("--classes", default=20, show_default=True, help="The first so many of ImageNet's.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=2, show_default=True, help="Of torch, on a CPU.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
def main(
    architecture: str, classes: int, device: str, threads: int, rounds: int, seed: int
) -> None:
    """Time the building of a zero-shot head, once both sides give the same one."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config = clip_models.architecture(architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(path, CLIP(config), Preprocess(config.vision_cfg.image_size))
        loaded = load_model(path, device)
        theirs = open_clip.create_model(f"local-dir:{path}", device=device).eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    class_names = open_clip.IMAGENET_CLASSNAMES[:classes]
    fillers = open_clip.OPENAI_IMAGENET_TEMPLATES
    templates = [fill("{c}") for fill in fillers]

    def ours() -> Tensor:
        return build_head(loaded, class_names, templates).weight

    def open_clips() -> Tensor:
        return open_clip.build_zero_shot_classifier(
            theirs, tokenizer, class_names, fillers, device=device
        )

    scale = float(loaded.model.logit_scale.detach().exp())
    difference = float((ours() / scale - open_clips().T.cpu()).abs().max())
    if difference > 1e-5:
        raise click.ClickException(f"the heads differ by {difference:.1e}")
    report = compare(
        {"ours": ours, "open_clip": open_clips},
        rounds=rounds,
        work=classes * len(templates),
        unit="prompts",
        arguments=arguments,
    )
    click.echo(json.dumps({**report, "difference": difference}))


if __name__ == "__main__":
    main()
