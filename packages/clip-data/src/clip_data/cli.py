"""The clip-data command."""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from clip_data.errors import DataError

PATH = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns expected failures into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DataError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="clip-data")
def main() -> None:
    """Images and captions to WebDataset shards."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")


@main.command()
@click.argument("source", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
@click.option(
    "--split",
    metavar="NAME",
    help="Write the split NAME of a labelled or retrieval set in CLIP_benchmark's layout.",
)
@click.option("--image-column", default="image", show_default=True, help="Column of image paths.")
@click.option(
    "--caption-column",
    help="Column of captions, one or a list.  [default: caption, if there is one]",
)
@click.option("--label-column", help="Column of class names.")
@click.option(
    "--classnames",
    metavar="FILE",
    type=PATH,
    help="The class names in order, one per line.  [default: those in OUT, else sorted]",
)
@click.option(
    "--templates",
    metavar="FILE",
    type=PATH,
    help="Prompt templates, one per line.  [default: those in OUT, else 'a photo of a {c}.']",
)
@click.option(
    "--samples-per-shard",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Rows of the source per shard.",
)
@click.option("--shuffle-seed", type=int, help="Shuffle the rows.  [default: keep their order]")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option(
    "--max-error-share",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Fail if more than this share of the rows is bad.",
)
def build(source: Path, output: Path, **options: Any) -> None:
    """Build shards in OUT from the images of SOURCE.

    SOURCE is a folder of images with captions beside them (KEY.txt, or KEY.json with a
    "caption"), a folder of images per class, or a .csv, .tsv, .jsonl or .parquet file whose image
    paths are relative to it. A killed build continues when the same command is run again.
    """
    from clip_data.builder import build

    click.echo(json.dumps(asdict(build(source, output, **options))))


@main.command()
@click.argument("output", metavar="OUT", type=PATH)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.pass_context
def verify(ctx: click.Context, output: Path, workers: int | None) -> None:
    """Read the shards in OUT again and report every fault; exit with 1 if there is any.

    OUT is a directory of shards or a labelled set with splits. What manifest and index say is
    checked where they are there, so the output of other tools can be verified too.
    """
    from clip_data.verifier import verify

    report = verify(output, workers=workers)
    click.echo(json.dumps(asdict(report)))
    ctx.exit(1 if report.faults else 0)
