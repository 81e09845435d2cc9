"""`clip-retrieval`: parse, call one function, print its result as JSON."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import click
from click.core import ParameterSource
from clip_models import ModelError

from clip_retrieval.errors import RetrievalError
from clip_retrieval.plan import FAMILIES, parse_size

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


_thumbnails = click.option(
    "--thumbnails",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Longer side, in pixels, of a small JPEG to keep of each picture; 0: none.",
)
_model = click.option(
    "--model", type=_DIRECTORY, help="Model directory.  [default: the index's own]"
)


@main.command()
@click.argument("model", type=_DIRECTORY)
@click.argument("source", type=_DIRECTORY)
@click.argument("out", type=_DIRECTORY)
@_thumbnails
@_batch_size
@_workers
@_device
def embed(**arguments: Any) -> None:
    """Embed SOURCE with MODEL, into OUT.

    SOURCE is a directory of .tar shards or of pictures, one split of a set, like SET/test, or a
    file with a caption on each line. OUT has clip-retrieval's layout. On several GPUs: accelerate
    launch -m clip_retrieval embed … A run that was interrupted continues where it was.
    """
    from clip_retrieval.embed_parts import embed_source as run

    result = run(**arguments)
    if result is not None:  # in the first process
        click.echo(json.dumps(result))


@main.command("build-index")
@click.argument("paths", type=_DIRECTORY, nargs=-1, required=True, metavar="[MODEL] SOURCE INDEX")
@click.option(
    "--target-recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the ten nearest images that the search must find; 1: exact.",
)
@click.option(
    "--max-memory",
    callback=_size,
    metavar="SIZE",
    default="4G",
    show_default=True,
    help="Memory the index may take while it is built.",
)
@click.option(
    "--family", type=click.Choice(FAMILIES), help="Kind of index.  [default: chosen to fit]"
)
@click.option("--append", is_flag=True, help="Add what SOURCE holds to the INDEX that is there.")
@click.option(
    "--remove",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Take out of INDEX, the only argument, the keys in FILE, one on a line; - is stdin.",
)
@_thumbnails
@_batch_size
@_workers
@_device
@click.pass_context
def build_index_command(
    ctx: click.Context,
    paths: tuple[Path, ...],
    append: bool,
    remove: TextIO | None,
    **options: Any,
) -> None:
    """Index SOURCE, encoded with MODEL.

    SOURCE holds embeddings, or is anything that `embed` takes. MODEL may be left out where the
    embeddings, or the INDEX appended to, name it. Writes the index directory INDEX. A build, or a
    change, that was interrupted continues where it was.
    """
    if remove is not None:
        if len(paths) != 1 or append:
            raise click.UsageError("--remove takes the INDEX only")
        from clip_retrieval.change import remove as run

        keys = {line.strip() for line in remove if line.strip()}
        click.echo(json.dumps(run(paths[0], keys, device=options["device"])))
        return
    if len(paths) not in (2, 3):
        raise click.UsageError("expected [MODEL] SOURCE INDEX")
    model, source, index = (None, *paths) if len(paths) == 2 else paths
    if append:
        for name in ("target_recall", "max_memory", "family"):
            options.pop(name)
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--append keeps the --{name.replace('_', '-')} of INDEX")
        from clip_retrieval.change import append as add

        result = add(model, source, index, **options)
    else:
        from clip_retrieval.build import build_index

        result = build_index(model, source, index, **options)
    click.echo(json.dumps(result))


@main.command()
@click.argument("out", type=_DIRECTORY)
@click.argument("indexes", type=_DIRECTORY, nargs=-1, required=True)
@_device
def merge(**arguments: Any) -> None:
    """Build one index, OUT, of the rows of several INDEXES of the same model."""
    from clip_retrieval.change import merge as run

    click.echo(json.dumps(run(**arguments)))


@main.command()
@click.argument("index", type=_DIRECTORY)
def info(index: Path) -> None:
    """What INDEX is: its model, plan, measured recall, parts and bytes."""
    from clip_retrieval.verify import describe_index

    click.echo(json.dumps(describe_index(index), indent=1))


@main.command()
@click.argument("index", type=_DIRECTORY)
def verify(index: Path) -> None:
    """Whether the index, metadata and embeddings of INDEX agree; exit status 1 if not."""
    from clip_retrieval.verify import verify_index

    result = verify_index(index)
    click.echo(json.dumps(result))
    if result["faults"]:
        raise SystemExit(1)


_PATHS = click.Path(path_type=Path, allow_dash=True)


@main.command()
@click.argument("index", type=_DIRECTORY)
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
    "in the json, OP one of = != < <= > >= ~ (contains).",
)
@click.option(
    "--fold",
    type=click.FloatRange(0, 1, min_open=True),
    help="Fold hits this similar to a better one into it, 0.97 say.  [default: show all]",
)
@_model
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
    from clip_retrieval.query import Query, fetch_image, minus, query_index, read_embeddings
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
        text = "\n".join(json.dumps(a.to_dict(), ensure_ascii=False) for a in answers)
    if output is None:
        click.echo(text)
        return
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(temporary, output)


def _read(path: str) -> bytes:
    return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()


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


@main.command()
@click.argument("indexes", nargs=-1, required=True, callback=_named, metavar="[NAME=]INDEX…")
@_model
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
    callback=_size,
    metavar="SIZE",
    default="16M",
    show_default=True,
    help="Largest request; a picture takes 4/3 of its size.",
)
@_device
def serve(indexes: dict[str, Path], **options: Any) -> None:
    """Search on a page, and over HTTP as clip-retrieval's clients do.

    An INDEX goes by the name of its directory or by NAME. One that is appended to is taken up
    without a restart. Prints one JSON line with the address once it is ready; SIGTERM and Ctrl-C
    end it.
    """
    from clip_retrieval.serve import serve

    serve(indexes, **options)
