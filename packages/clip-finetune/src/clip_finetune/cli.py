"""The command line: parse, call one function, print one JSON."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource
from clip_models import ModelError, without_shutdown

from clip_finetune.config import CurveConfig, TrainConfig
from clip_finetune.errors import FinetuneError
from clip_finetune.recipes import RECIPES

_Command = Callable[..., Any]

STOPPED = 3  # exit status after SIGTERM: the state is saved, run the command again


class _Group(click.Group):
    """Turns expected failures into one line and exit status 1."""

    def main(self, *args: Any, **options: Any) -> Any:
        with without_shutdown():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FinetuneError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise click.ClickException(
                f"a process that decodes images was lost ({error}); if memory ran out, ask for "
                "fewer --workers or a smaller --batch-size, and run this again"
            ) from error


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
    elif hint is bool:
        settings["is_flag"] = True
    else:
        settings["type"] = click.Path(path_type=Path) if hint is Path else hint
    if field.default is MISSING:
        settings["required"] = True
    else:
        shown = field.default not in ((), "", False)
        settings |= {"default": field.default, "show_default": shown}
    return click.option("--" + field.name.replace("_", "-"), **settings)


def _fill_in(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    """A recipe's values take the place of the defaults, and what is said beside it theirs."""
    if name is not None:
        ctx.default_map = {**(ctx.default_map or {}), **RECIPES[name]}


def _configured(config: type[Any], options: dict[str, Any]) -> Any:
    try:
        return config(**options)
    except FinetuneError as error:
        raise click.UsageError(str(error)) from error


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
@click.option(
    "--recipe", type=click.Choice(tuple(RECIPES)), is_eager=True, expose_value=False,
    callback=_fill_in, metavar="NAME",
    help="A published recipe, where no option says else; the defaults are joint-8's. One of "
    f"{', '.join(RECIPES)}.",
)  # fmt: skip
@_options_of(TrainConfig)
@click.option("--dry-run", is_flag=True, help="Print what the run would be, and write nothing.")
@click.pass_context
def train(ctx: click.Context, model: Path, out: Path, dry_run: bool, **options: Any) -> None:
    """Fine-tune MODEL on labelled sets into the model directory OUT, with a head for each set.

    By default only the image tower learns; the text tower and the heads stay as they are. SIGTERM
    and Ctrl-C save the train state (OUT.state) and exit with 3; the same command then continues.
    Run it under `accelerate launch` or torchrun for several processes.
    """
    if ctx.get_parameter_source("iterations") is ParameterSource.COMMANDLINE and options["epochs"]:
        if ctx.get_parameter_source("epochs") is ParameterSource.COMMANDLINE:
            raise click.UsageError("give --iterations or --epochs, not both")
        options["epochs"] = 0.0  # the recipe's
    config = _configured(TrainConfig, options)
    if dry_run:
        from clip_finetune.dry_run import plan_run

        _echo(plan_run(model, config))
        return
    from clip_finetune.loop import train as run

    result = run(model, out, config)
    if os.environ.get("RANK", "0") == "0":  # one JSON for all processes
        _echo(result)
    if result["status"] == "stopped":
        sys.exit(STOPPED)


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
@click.argument("models", type=_FOLDER, nargs=-1, required=True)
@click.argument("out", type=_FOLDER)
@click.option("--weights", default="", help="Of the models in order, e.g. 0.5,0.3,0.2.  "
              "Default: all the same.")  # fmt: skip
@click.option("--extrapolate", is_flag=True, help="Allow weights outside 0 to 1.")
def soup(models: tuple[Path, ...], out: Path, weights: str, extrapolate: bool) -> None:
    """Write the weighted mean of MODELS, heads included, as the model directory OUT."""
    from clip_finetune.interpolate import soup_models as run

    try:
        shares = [float(part) for part in weights.split(",")] if weights else []
    except ValueError as error:
        raise click.BadParameter("expected numbers with commas", param_hint="--weights") from error
    _echo(run(models, out, shares, extrapolate=extrapolate))


@main.command()
@click.argument("base", type=_FOLDER)
@click.argument("finetuned", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@_options_of(CurveConfig)
def curve(base: Path, finetuned: Path, out: Path, **options: Any) -> None:
    """Accuracy at every alpha on ID sets and on others, in one pass over the images.

    Writes OUT/curve.json and OUT/curve.png. BASE is the zero-shot model, FINETUNED what `train`
    made of it.
    """
    config = _configured(CurveConfig, options)
    from clip_finetune.curve import measure_curve as run

    _echo(run(base, finetuned, out, config))


def _echo(result: dict[str, Any]) -> None:
    click.echo(json.dumps(result))
