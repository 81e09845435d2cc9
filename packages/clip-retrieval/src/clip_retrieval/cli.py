"""`clip-retrieval`: parse, call one function, print its result as JSON."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click
from clip_models import ModelError

from clip_retrieval.errors import RetrievalError
from clip_retrieval.plan import parse_size

_DIRECTORY = click.Path(path_type=Path)


class _Tool(click.Group):
    """Expected failures become one line and exit status 1; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `… | head`: Click ends quietly
            raise
        except (RetrievalError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size like 512M or 4G") from None


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    numbers = value.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise click.BadParameter(f"{value!r} is not a list of numbers from 1, like 1,5,10")
    return tuple(int(n) for n in numbers)


_batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Images encoded at a time.",
)
_workers = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=min(8, os.cpu_count() or 1),
    show_default="CPUs, at most 8",
    help="Processes that read and decode images; 0: none beside this one.",
)
_device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


@click.group(cls=_Tool)
@click.version_option(package_name="clip-retrieval")
def main() -> None:
    """A FAISS index over images and captions: build, query, evaluate."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("clip_retrieval").setLevel(logging.INFO)  # FAISS's own is too chatty


@main.command("build-index")
@click.argument("model", type=_DIRECTORY)
@click.argument("shards", type=_DIRECTORY)
@click.argument("index", type=_DIRECTORY)
@click.option(
    "--target-recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the ten nearest images that the search must find.",
)
@click.option(
    "--max-memory",
    callback=_size,
    metavar="SIZE",
    default="4G",
    show_default=True,
    help="Memory the index may take while it is built.",
)
@_batch_size
@_workers
@_device
def build_index_command(**arguments: Any) -> None:
    """Index the images of SHARDS, encoded with MODEL.

    Writes the index directory INDEX. SHARDS is a directory of .tar shards, or one split of a
    set, like SET/test. A build that was interrupted continues where it was.
    """
    from clip_retrieval.build import build_index

    click.echo(json.dumps(build_index(**arguments)))


@main.command()
@click.argument("index", type=_DIRECTORY)
@click.option("--text", "texts", multiple=True, help="Look for this text (repeatable).")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="Look for images like this file; - reads one from stdin (repeatable).",
)
@click.option(
    "-k", type=click.IntRange(min=1), default=10, show_default=True, help="Hits per query."
)
@click.option("--model", type=_DIRECTORY, help="Model directory.  [default: the index's own]")
@click.option(
    "--format",
    "style",
    type=click.Choice(["json", "table", "html"]),
    default="json",
    show_default=True,
    help="JSON Lines, a table, or a page with the pictures in it.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write.  [default: stdout]")
@_device
def query(
    index: Path,
    texts: tuple[str, ...],
    images: tuple[Path, ...],
    k: int,
    model: Path | None,
    style: str,
    output: Path | None,
    device: str,
) -> None:
    """Find the images nearest to texts and images.

    Prints one JSON line per query: texts first, then images, in the order given.
    """
    if not texts and not images:
        raise click.UsageError("give at least one --text or --image")
    from clip_retrieval.search import Index, Query, query_index
    from clip_retrieval.sheet import contact_sheet, table

    queries = [Query(text=text) for text in texts]
    for path in images:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        queries.append(Query(image=data, name=str(path)))
    opened = Index(index)
    answers = query_index(opened, queries, k=k, model=model, device=device)
    if style == "html":
        text = contact_sheet(answers, opened.image)
    elif style == "table":
        text = table(answers)
    else:
        text = "\n".join(json.dumps(a.to_dict(), ensure_ascii=False) for a in answers)
    if output is None:
        click.echo(text)
        return
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(temporary, output)


@main.command("eval")
@click.argument("model", type=_DIRECTORY)
@click.argument("sets", type=_DIRECTORY, nargs=-1, required=True)
@click.option("--split", default="test", show_default=True, help="Split of each set.")
@click.option(
    "--recall-k",
    callback=_numbers,
    metavar="K,…",
    default="1,5,10",
    show_default=True,
    help="The k of Recall@k.",
)
@_batch_size
@_workers
@_device
def eval_command(**arguments: Any) -> None:
    """Measure zero-shot retrieval, both ways.

    Prints one JSON line per SET. A SET is a directory in CLIP_benchmark's layout, one caption
    per line in its .txt members, or a directory of training shards.
    """
    from clip_retrieval.evaluate import evaluate_retrieval

    for result in evaluate_retrieval(**arguments):
        click.echo(json.dumps(result))
