"""The `clip-models` command."""

import json
import logging
from pathlib import Path
from typing import Any

import click

from clip_models.errors import ModelError


class _Group(click.Group):
    """Expected failures become one line and exit 1; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="clip-models")
def main() -> None:
    """Make and inspect CLIP model directories."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@main.command("list")
def list_() -> None:
    """List the named architectures, one JSON line each."""
    from clip_models.architectures import architecture, architecture_names
    from clip_models.profiles import profile

    for name in architecture_names():
        click.echo(json.dumps({"name": name, **profile(architecture(name))}))


@main.command()
@click.argument("architecture_name", metavar="ARCHITECTURE")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
def init(architecture_name: str, output: Path, seed: int) -> None:
    """Write a model directory OUTPUT with random weights.

    ARCHITECTURE is a name from `clip-models list` or a JSON file with open_clip's model_cfg.
    """
    from clip_models.architectures import architecture
    from clip_models.model_dir import init_model

    click.echo(json.dumps(init_model(architecture(architecture_name), output, seed)))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def show(model: Path, as_json: bool) -> None:
    """Show what a model directory holds: towers, size, provenance, heads."""
    from clip_models.describe import describe_model, format_description

    description = describe_model(model)
    click.echo(json.dumps(description) if as_json else format_description(description))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--image-size", type=int, help="Side of the images, in pixels.")
@click.option("--context-length", type=int, help="Longest caption, in tokens.")
def resize(model: Path, output: Path, image_size: int | None, context_length: int | None) -> None:
    """Write MODEL as OUTPUT for another image size or context length.

    Position embeddings are interpolated; train or fine-tune the result.
    """
    if image_size is None and context_length is None:
        raise click.UsageError("give --image-size, --context-length or both")
    from clip_models.resize import resize_directory

    click.echo(json.dumps(resize_directory(model, output, image_size, context_length)))


@main.command()
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--architecture", metavar="NAME|FILE", help="Towers of a file of weights alone.")
@click.option(
    "--to",
    "layout",
    type=click.Choice(["open-clip", "transformers"]),
    default="open-clip",
    show_default=True,
    help="Layout of OUTPUT; for transformers, SOURCE is a model directory.",
)
def convert(source: str, output: Path, architecture: str | None, layout: str) -> None:
    """Write SOURCE as a model directory, or a model directory for transformers.

    SOURCE is a weight file (.safetensors, .bin, .pt of open_clip; OpenAI's own .pt), a directory in
    open_clip's or transformers' layout, or org/name on the Hugging Face hub. No code in it is run.
    """
    if layout == "transformers":
        if architecture is not None:
            raise click.UsageError("--architecture is for files of weights, not with transformers")
        from clip_models.convert_export import export_transformers

        click.echo(json.dumps(export_transformers(source, output)))
    else:
        from clip_models.convert import convert

        click.echo(json.dumps(convert(source, output, architecture)))


@main.command("build-head")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--dataset", type=click.Path(path_type=Path), help="Take both from this data set.")
@click.option(
    "--classnames", metavar="FILE|NAME", help="File of class names, one a line; or imagenet."
)
@click.option(
    "--templates",
    metavar="FILE|NAME",
    help="File of prompts with {c}, one a line; or general (the default where --dataset has none), "
    "openai-imagenet, simple-imagenet.",
)
@click.option("--allow-duplicates", is_flag=True, help="Class names may repeat, as ImageNet's do.")
def build_head(
    model: Path,
    name: str,
    dataset: Path | None,
    classnames: str | None,
    templates: str | None,
    allow_duplicates: bool,
) -> None:
    """Build a zero-shot head from text and add it to MODEL as heads/NAME.safetensors.

    The lists of ImageNet come from the open_clip package (open-clip-torch), where installed.
    """
    if classnames is None and dataset is None:
        raise click.UsageError("give --dataset or --classnames")
    from clip_models.heads import add_zero_shot_head

    added = add_zero_shot_head(
        model,
        name,
        dataset=dataset,
        classnames=classnames,
        templates=templates,
        allow_duplicates=allow_duplicates,
    )
    click.echo(json.dumps(added))
