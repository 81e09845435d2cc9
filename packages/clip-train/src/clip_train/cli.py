"""The command line: options from TrainConfig's fields, one JSON line on stdout."""

import json
import logging
import os
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from clip_models import ModelError

from clip_train.config import TrainConfig
from clip_train.errors import TrainError

STOPPED = 3  # exit code of a run that was asked to stop and saved its state


class TrainCommand(click.Command):
    """Turns expected failures into one line and exit code 1."""

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
        if get_origin(kind) is Literal:
            kind = click.Choice(get_args(kind))
        elif kind is Path:
            kind = click.Path(path_type=Path, file_okay=False)
        required = field.default is MISSING
        options.append(
            click.Option(
                ["--" + field.name.replace("_", "-")],
                type=kind,
                required=required,
                default=None if required else field.default,
                show_default=not required,
                help=text,
            )
        )
    return options


@click.command(
    cls=TrainCommand,
    params=config_options(),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="clip-train")
def main(**arguments: Any) -> None:
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
    from clip_train.loop import train

    summary = train(config)
    if main_process:
        click.echo(json.dumps(asdict(summary)))
    if summary.status == "stopped":
        raise click.exceptions.Exit(STOPPED)
