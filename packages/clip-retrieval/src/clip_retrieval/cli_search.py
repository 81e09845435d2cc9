"""The commands that ask an index: query, serve; and eval."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from clip_retrieval.cli_options import (
    DIRECTORY,
    batch_size_option,
    device_option,
    model_option,
    parse_size_option,
    workers_option,
)

_PATHS = click.Path(path_type=Path, allow_dash=True)


@click.command()
@click.argument("index", type=DIRECTORY)
@click.option("--text", "texts", multiple=True, help="Look for this text (repeatable).")
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    help="Look for images like this file, or http:// URL on this machine; - reads one from stdin "
    "(repeatable).",
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    type=_PATHS,
    help="Look for these rows: .npy, or JSON lists of numbers; - is stdin (repeatable).",
)
@click.option("--minus-text", "less_texts", multiple=True, help="Less of this (repeatable).")
@click.option(
    "--minus-image", "less_images", multiple=True, metavar="FILE", help="Less of this (repeatable)."
)
@click.option("--combine", is_flag=True, help="One query, the sum of all that is given.")
@click.option(
    "-k", type=click.IntRange(min=1), default=10, show_default=True, help="Hits per query."
)
@click.option("--threshold", type=click.FloatRange(-1, 1), help="Least similarity of a hit.")
@click.option(
    "--where",
    metavar="FILTER",
    help="Only rows like this: NAME OP VALUE, several joined by `and`; NAME is a column or a name "
    "in the json, OP one of = != < <= > >= ~ (contains); VALUE may be in quotes.",
)
@click.option(
    "--fold",
    type=click.FloatRange(0, 1, min_open=True),
    help="Fold hits this similar to a better one into it, 0.97 say.  [default: show all]",
)
@model_option
@click.option(
    "--format",
    "style",
    type=click.Choice(["json", "table", "html"]),
    default="json",
    show_default=True,
    help="JSON Lines, a table, or a page with the pictures in it.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write.  [default: stdout]")
@device_option
def query(
    index: Path,
    texts: tuple[str, ...],
    images: tuple[str, ...],
    embeddings: tuple[Path, ...],
    less_texts: tuple[str, ...],
    less_images: tuple[str, ...],
    combine: bool,
    style: str,
    output: Path | None,
    **options: Any,
) -> None:
    """Find the images nearest to texts, images and embeddings.

    Prints one JSON line per query: texts first, then images, then embeddings, in the order given.
    With --combine, or where something is subtracted, all of it is one query.
    """
    if not texts and not images and not embeddings:
        raise click.UsageError("give at least one --text, --image or --embedding")
    if sum(str(path) == "-" for path in (*images, *embeddings, *less_images)) > 1:
        raise click.UsageError("stdin can be read once only")
    from clip_retrieval.query import (
        Query,
        fetch_image,
        minus,
        query_index,
        read_embeddings,
        to_json,
    )
    from clip_retrieval.search import Index
    from clip_retrieval.sheet import contact_sheet, table

    def image(path: str) -> Query:
        if path.startswith(("http://", "https://")):
            return Query(image=fetch_image(path), name=path)
        return Query(image=_read(path), name=path)

    queries = [Query(text=text) for text in texts] + [image(path) for path in images]
    for path in embeddings:
        queries += read_embeddings(_read(str(path)), str(path))
    less = [minus(Query(text=text)) for text in less_texts]
    less += [minus(image(path)) for path in less_images]
    opened = Index(index, options["device"])
    asked = [(*queries, *less)] if combine or less else queries
    answers = query_index(opened, asked, **options)
    if style == "html":
        text = contact_sheet(answers, opened.image)
    elif style == "table":
        text = table(answers)
    else:
        text = "\n".join(to_json(answer.to_dict()).decode() for answer in answers)
    if output is None:
        click.echo(text)
        return
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(temporary, output)


def _read(path: str) -> bytes:
    return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    numbers = value.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise click.BadParameter(f"{value!r} is not a list of numbers from 1, like 1,5,10")
    return tuple(int(n) for n in numbers)


@click.command("eval")
@click.argument("model", type=DIRECTORY)
@click.argument("sets", type=DIRECTORY, nargs=-1, required=True)
@click.option("--split", default="test", show_default=True, help="Split of each set.")
@click.option(
    "--recall-k",
    callback=_numbers,
    metavar="K,…",
    default="1,5,10",
    show_default=True,
    help="The k of Recall@k.",
)
@batch_size_option
@workers_option
@device_option
def eval_command(**arguments: Any) -> None:
    """Measure zero-shot retrieval, both ways.

    Prints one JSON line per SET. A SET is a directory in CLIP_benchmark's layout, one caption
    per line in its .txt members, or a directory of training shards.
    """
    from clip_retrieval.evaluate import evaluate_retrieval

    for result in evaluate_retrieval(**arguments):
        click.echo(json.dumps(result))


def _named(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, Path]:
    """INDEX or NAME=INDEX -> {name: index}, in their order."""
    named = dict[str, Path]()
    for argument in value:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = Path(argument).resolve().name, argument
        if not name or "/" in name or name in named:
            raise click.BadParameter(f"{argument!r}: give each index a name of its own, NAME=INDEX")
        named[name] = Path(path)
    return named


@click.command()
@click.argument("indexes", nargs=-1, required=True, callback=_named, metavar="[NAME=]INDEX…")
@model_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; 0.0.0.0 lets everybody in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=1234,
    show_default=True,
    help="Port to listen at; 0: any that is free.",
)
@click.option(
    "--fold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.94,
    show_default=True,
    help="Cosine similarity from which two hits are duplicates.",
)
@click.option(
    "--max-body",
    callback=parse_size_option,
    metavar="SIZE",
    default="16M",
    show_default=True,
    help="Largest request; a picture takes 4/3 of its size.",
)
@device_option
def serve(indexes: dict[str, Path], **options: Any) -> None:
    """Search on a page, and over HTTP as clip-retrieval's clients do.

    An INDEX goes by the name of its directory or by NAME. One that is appended to is taken up
    without a restart. Prints one JSON line with the address once it is ready; SIGTERM and Ctrl-C
    end it.
    """
    from clip_retrieval.serve import serve

    serve(indexes, **options)
