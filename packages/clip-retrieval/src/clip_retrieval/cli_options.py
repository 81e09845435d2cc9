"""Options that several commands of clip-retrieval have."""

import os
from pathlib import Path

import click

from clip_retrieval.plan import parse_size

DIRECTORY = click.Path(path_type=Path)


def parse_size_option(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size like 512M or 4G") from None


batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Images encoded at a time.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=min(8, os.cpu_count() or 1),
    show_default="CPUs, at most 8",
    help="Processes that read and decode images; 0: none beside this one.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
model_option = click.option(
    "--model", type=DIRECTORY, help="Model directory.  [default: the index's own]"
)
