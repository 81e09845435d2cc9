"""The clip-data command."""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from clip_data.build_options import (
    columns_options,
    downloads_options,
    images_options,
    workers_option,
)
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
    """Images and captions to WebDataset shards, and what can be done with them.

    Directories and files may be URLs of any kind that fsspec knows: s3://, gs://, hf://, ...
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@main.command()
@click.argument("source")
@click.argument("output", metavar="OUT")
@click.option(
    "--split",
    metavar="NAME",
    help="Write the split NAME of a labelled or retrieval set in CLIP_benchmark's layout.",
)
@columns_options
@click.option("--source-split", help="Split of a Hugging Face data set.  [default: train]")
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
@click.option(
    "--hash-range",
    type=(click.FloatRange(0, 1), click.FloatRange(0, 1)),
    metavar="FROM TO",
    default=(0.0, 1.0),
    help="Only the rows whose image's name hashes into this part: 0 0.9 to train, 0.9 1 to test.",
)
@images_options
@downloads_options
@workers_option
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the workers run; ray: RAY_ADDRESS's cluster (install clip-data[ray]).",
)
@click.option(
    "--max-error-share",
    type=click.FloatRange(0, 1),
    help="Fail if more than this share of the rows is bad.  [default: 0.1; of addresses 0.9]",
)
@click.option("--retry-failed", is_flag=True, help="Try the failed rows of a finished build again.")
def build(
    source: str,
    output: str,
    image_column: str | None,
    url_column: str | None,
    caption_column: tuple[str, ...],
    label_column: str | None,
    **options: Any,
) -> None:
    """Build shards in OUT from the images of SOURCE.

    SOURCE is a folder of images with captions beside them (KEY.txt, or KEY.json with a
    "caption"), a folder of images per class, a .csv, .tsv, .jsonl or .parquet file (or a folder of
    these last) whose image paths are relative to it or whose addresses are to be downloaded,
    WebDataset tars, or a Hugging Face data set: a folder of save_to_disk, an .arrow or .parquet
    file with images, or hf://datasets/OWNER/NAME. A killed build continues when the same command is
    run again.
    """
    from clip_data.builder import build
    from clip_data.download import DownloadOptions
    from clip_data.images import ImageOptions
    from clip_data.sources import ColumnOptions

    columns = ColumnOptions(image_column, url_column, caption_column, label_column)
    respect_robots = not options.pop("ignore_robots")
    images, downloads = _take(options, ImageOptions), _take(options, DownloadOptions)
    summary = build(
        source,
        output,
        columns=columns,
        images=ImageOptions(**images),
        downloads=DownloadOptions(respect_robots=respect_robots, **downloads),
        **options,
    )
    click.echo(json.dumps(asdict(summary)))


def _take(options: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Remove from the options those that are fields of a dataclass."""
    return {name: options.pop(name) for name in list(options) if name in kind.__dataclass_fields__}


@main.command()
@click.argument("source", metavar="DIR")
@workers_option
def index(source: str, workers: int | None) -> None:
    """Write an offset index beside each tar in DIR, and sizes.json: for img2dataset's output.

    clip-train and clip-retrieval then start at once, without reading the tars' headers.
    """
    from clip_data.indexer import index_shards

    click.echo(json.dumps(asdict(index_shards(source, workers=workers))))


@main.command()
@click.argument("output", metavar="DIR")
@workers_option
@click.pass_context
def verify(ctx: click.Context, output: str, workers: int | None) -> None:
    """Read the shards in DIR again and report every fault; exit with 1 if there is any.

    DIR is a directory of shards or a labelled set with splits. What manifest and index say is
    checked where they are there, so the output of other tools can be verified too.
    """
    from clip_data.verifier import verify

    report = verify(output, workers=workers)
    click.echo(json.dumps(asdict(report)))
    ctx.exit(1 if report.faults else 0)


@main.command()
@click.argument("shards", metavar="DIR")
@click.option("--page", metavar="FILE", help="Write an HTML page with plots and pictures.")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=48,
    show_default=True,
    help="Pictures on the page, drawn at random.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawing.")
@workers_option
def inspect(shards: str, **options: Any) -> None:
    """Count what the shards in DIR hold: sizes of images, lengths and words of captions."""
    from clip_data.inspector import inspect

    click.echo(json.dumps(asdict(inspect(shards, **options))))


@main.command()
@click.argument("shards", metavar="DIR")
@click.argument("output", metavar="OUT")
@click.option(
    "--samples", type=click.IntRange(min=1), required=True, help="How many samples to keep."
)
@click.option(
    "--by",
    type=click.Choice(["sample", "shard"]),
    default="sample",
    show_default=True,
    help="Choose samples; or whole shards, which is right where the rows were shuffled.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice.")
@workers_option
def subset(shards: str, output: str, **options: Any) -> None:
    """Write a random subset of the shards in DIR to OUT.

    Subsets of one seed are nested: each smaller one is within each larger one.
    """
    from clip_data.subsets import subset

    click.echo(json.dumps(asdict(subset(shards, output, **options))))


@main.command("filter")
@click.argument("shards", metavar="DIR")
@click.argument("output", metavar="OUT")
@click.option(
    "--where",
    required=True,
    metavar="EXPRESSION",
    help="An SQL condition, such as 'similarity > 0.3 AND width >= 256'.",
)
@workers_option
def filter_command(shards: str, output: str, **options: Any) -> None:
    """Write the samples of DIR that satisfy a condition to OUT.

    The columns are those of the shards' Parquet files.
    """
    from clip_data.filter import filter_shards

    click.echo(json.dumps(asdict(filter_shards(shards, output, **options))))


@main.command()
@click.argument("shards", metavar="DIR")
@click.argument("output", metavar="[OUT]", required=False)
@click.option(
    "--against",
    metavar="DIR",
    multiple=True,
    help="An evaluation set: drop what is in it; may be repeated.  [default: DIR itself]",
)
@click.option(
    "--distance",
    type=click.IntRange(0, 16),
    default=0,
    show_default=True,
    help="Bits of 64 in which the perceptual hashes of duplicates may differ.",
)
@click.option("--report", metavar="FILE", help="Write a line for each duplicate (.jsonl).")
@workers_option
def dedup(shards: str, output: str | None, against: tuple[str, ...], **options: Any) -> None:
    """Find duplicate images in DIR by perceptual hash (pHash), and write the others to OUT."""
    from clip_data.duplicates import dedup

    click.echo(json.dumps(asdict(dedup(shards, output, against=against, **options))))
