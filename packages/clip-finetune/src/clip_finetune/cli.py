"""The command line: parse, call one function, print one JSON."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from clip_models import ModelError

from clip_finetune.config import TrainConfig
from clip_finetune.errors import FinetuneError

_Command = Callable[..., Any]

STOPPED = 3  # exit status after SIGTERM: the state is saved, run the command again


class _Group(click.Group):
    """Turns expected failures into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FinetuneError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error


def _options_of(config: type) -> Callable[[_Command], _Command]:
    """One option for each field of a config dataclass, with its type, default and help."""
    hints = get_type_hints(config)

    def decorate(command: _Command) -> _Command:
        for field in reversed(fields(config)):
            command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: Field[Any], hint: Any) -> Callable[[Any], Any]:
    settings: dict[str, Any] = {"help": field.metadata["help"]}
    if get_origin(hint) is tuple:  # tuple[X, ...]: an option to repeat
        hint = get_args(hint)[0]
        settings["multiple"] = True
    if get_origin(hint) is Literal:
        settings["type"] = click.Choice(get_args(hint))
    else:
        settings["type"] = click.Path(path_type=Path) if hint is Path else hint
    if field.default is MISSING:
        settings["required"] = True
    else:
        settings |= {"default": field.default, "show_default": field.default != ()}
    return click.option("--" + field.name.replace("_", "-"), **settings)


_FOLDER = click.Path(path_type=Path)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="clip-finetune")
def main() -> None:
    """Fine-tune a CLIP image tower against frozen heads, and interpolate its weights."""
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_process else logging.WARNING, format="%(message)s"
    )


@main.command()
@click.argument("model", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@_options_of(TrainConfig)
def train(model: Path, out: Path, **options: Any) -> None:
    """Train the image tower of MODEL against frozen heads into the model directory OUT.

    The text tower and the heads stay as they are; the heads go along to OUT/heads. SIGTERM saves
    the train state (OUT.state) and exits with 3; the same command then continues.
    """
    try:
        config = TrainConfig(**options)
    except FinetuneError as error:
        raise click.UsageError(str(error)) from error
    from clip_finetune.loop import train as run

    result = run(model, out, config)
    if os.environ.get("RANK", "0") == "0":  # one JSON for all processes
        _echo(result)
    if result["status"] == "stopped":
        raise click.exceptions.Exit(STOPPED)


@main.command()
@click.argument("base", type=_FOLDER)
@click.argument("finetuned", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--alpha", type=float, required=True, help="0 gives BASE, 1 gives FINETUNED.")
@click.option("--extrapolate", is_flag=True, help="Allow an alpha outside 0 to 1.")
def interpolate(base: Path, finetuned: Path, out: Path, alpha: float, extrapolate: bool) -> None:
    """Write (1 - alpha) BASE + alpha FINETUNED as the model directory OUT, heads included."""
    from clip_finetune.interpolate import interpolate_models as run

    _echo(run(base, finetuned, out, alpha, extrapolate=extrapolate))


@main.command()
@click.argument("base", type=_FOLDER)
@click.argument("finetuned", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--id", "id_set", type=_FOLDER, required=True, help="Labelled set tuned on.")
@click.option(
    "--ood", "ood_sets", type=_FOLDER, required=True, multiple=True,
    help="Labelled set under a shift; repeat it for several.",
)  # fmt: skip
@click.option(
    "--alphas", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", show_default=True,
    help="Points of the curve.",
)  # fmt: skip
@click.option("--split", default="test", show_default=True, help="Split that is reported.")
@click.option("--val-split", default="val", show_default=True, help="Split that chooses alpha.")
@click.option(
    "--rule", type=click.Choice(["best-id", "best-mean", "fixed"]), default="best-id",
    show_default=True,
    help="Chosen alpha: best on ID, best mean of ID and OOD (both on --val-split), or 0.5.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
              help="Images encoded at once.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0), default=4, show_default=True,
              help="Processes that decode images.")  # fmt: skip
@click.option("--device", help="cpu, cuda, …  Default: cuda where there is one.")
def curve(base: Path, finetuned: Path, out: Path, alphas: str, **options: Any) -> None:
    """Accuracy at every alpha on an ID set and on shifted sets, in one pass over the images.

    Writes OUT/curve.json and OUT/curve.png. BASE is the zero-shot model, FINETUNED what `train`
    made of it.
    """
    from clip_finetune.curve import measure_curve as run

    _echo(run(base, finetuned, out, alphas=_numbers(alphas), **options))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter("expected numbers with commas", param_hint="--alphas") from error


def _echo(result: dict[str, Any]) -> None:
    click.echo(json.dumps(result))
