"""The command line: options from TrainConfig's fields, one JSON line on stdout."""

import json
import logging
import os
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from clip_models import ModelError, without_shutdown

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.recipes import RECIPES

STOPPED = 3  # exit code of a run that was asked to stop and saved its state


class TrainCommand(click.Command):
    """Turns expected failures into one line and exit code 1."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command as a program."""
        with without_shutdown():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (TrainError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error


def config_options() -> list[click.Parameter]:
    """One option for each field of TrainConfig."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    options: list[click.Parameter] = []
    for field in fields(TrainConfig):
        kind, text = get_args(hints[field.name])
        if isinstance(kind, UnionType):  # or None, which is the default
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            kind = click.Choice(get_args(kind))
        elif kind is Path:
            kind = click.Path(path_type=Path, file_okay=False)
        required, default = field.default is MISSING, field.default
        options.append(
            click.Option(
                ["--" + field.name.replace("_", "-")],
                type=kind,
                is_flag=kind is bool,
                required=required,
                default=None if required else default,
                show_default=default not in (MISSING, None, "", False),
                help=text,
            )
        )
    return options


def _fill_in(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    """A recipe's values take the place of the defaults, and what is said beside it theirs."""
    if name is not None:
        ctx.default_map = {**(ctx.default_map or {}), **RECIPES[name]._asdict()}


RECIPE = click.Option(
    ["--recipe"],
    type=click.Choice(tuple(RECIPES)),
    is_eager=True,
    expose_value=False,
    callback=_fill_in,
    metavar="NAME",
    help="A run of the paper: its model, samples seen, batch, learning rate and warm-up, where no "
    f"option says else. One of {', '.join(RECIPES)}.",
)
DRY_RUN = click.Option(
    ["--dry-run"],
    is_flag=True,
    help="Print what the run would be and what looks wrong, and write nothing.",
)


@click.command(
    cls=TrainCommand,
    params=[RECIPE, *config_options(), DRY_RUN],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="clip-train")
def main(dry_run: bool, **arguments: Any) -> None:
    """Train a CLIP model from WebDataset shards.

    Run it under `accelerate launch` or torchrun for several processes. Run again with the same
    arguments, it continues from the newest saved state, or says that nothing is left to do; SIGTERM
    and Ctrl-C save the state and exit with code 3.
    """
    try:
        config = TrainConfig(**arguments)
    except TrainError as error:
        raise click.UsageError(str(error)) from error
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_process else logging.WARNING, format="%(message)s"
    )
    if dry_run:
        from clip_train.dry_run import plan_run

        plan = plan_run(config)
        for warning in plan.warnings:
            logging.warning("warning: %s", warning)
        click.echo(json.dumps(asdict(plan)))
        return
    from clip_train.loop import train

    summary = train(config)
    if main_process:
        click.echo(json.dumps(asdict(summary)))
    if summary.status == "stopped":
        sys.exit(STOPPED)
