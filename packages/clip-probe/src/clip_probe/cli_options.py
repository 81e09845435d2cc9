"""Options that the commands share: how images are encoded, what is written about them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_probe.errors import ProbeError

if TYPE_CHECKING:
    from clip_models import LoadedModel

FOLDER = click.Path(path_type=Path)


def encoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """How images are read and encoded; the same for every command."""
    for decorate in reversed(
        [
            click.option(
                "--batch-size",
                default=64,
                show_default=True,
                type=click.IntRange(1),
                help="Images encoded at once.",
            ),
            click.option(
                "--workers",
                default=2,
                show_default=True,
                type=click.IntRange(0),
                help="Processes that decode images; 0 decodes in the main process.",
            ),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Where the model runs; auto takes cuda where there is one.",
            ),
            click.option(
                "--precision",
                type=click.Choice(["fp32", "bf16"]),
                default="fp32",
                show_default=True,
                help="Of the image tower; scores are always computed in float32.",
            ),
            click.option(
                "--cache",
                type=FOLDER,
                metavar="DIR",
                help="Keep features here: no image is encoded twice by one model, and what was "
                "interrupted continues.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def detail_options(command: Callable[..., None]) -> Callable[..., None]:
    """Files about each head on each set."""
    for decorate in (
        click.option(
            "--save-predictions",
            is_flag=True,
            help="With --output, also predictions.parquet: what was said of each image.",
        ),
        click.option(
            "--output",
            type=FOLDER,
            metavar="DIR",
            help="Write tables by class, the confusion matrix and a reliability plot to DIR/SET.",
        ),
    ):
        command = decorate(command)
    return command


def text_options(command: Callable[..., None]) -> Callable[..., None]:
    """The texts of a zero-shot head."""
    for decorate in (
        click.option(
            "--classnames",
            metavar="FILE|NAME",
            help="Class names, one a line, or a list known by name (imagenet), instead of the "
            "sets' own.",
        ),
        click.option(
            "--templates",
            metavar="FILE|NAME",
            help="Prompt templates, one a line with {c} for the class name, or a list known by "
            "name (general, openai-imagenet, simple-imagenet), instead of the sets' own.",
        ),
    ):
        command = decorate(command)
    return command


def load(model: Path, device: str) -> "LoadedModel":
    import torch
    from clip_models import load_model

    from clip_probe.features import place

    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ProbeError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return load_model(model, device=place("cuda" if cuda and device != "cpu" else "cpu"))
