"""`clip-retrieval`: parse, call one function, print its result as JSON."""

import json
import logging
import sys
from pathlib import Path
from typing import Any, TextIO

import click
from click.core import ParameterSource
from clip_models import ModelError, without_shutdown

from clip_retrieval.cli_options import (
    DIRECTORY,
    batch_size_option,
    device_option,
    parse_size_option,
    workers_option,
)
from clip_retrieval.cli_search import eval_command, query, serve
from clip_retrieval.errors import RetrievalError
from clip_retrieval.plan import FAMILIES


class _Tool(click.Group):
    """Expected failures become one line and exit status 1; bugs keep their traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        with without_shutdown():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `… | head`: Click ends quietly
            raise
        except (RetrievalError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise click.ClickException(
                f"a process that decodes images was lost ({error}); if memory ran out, ask for "
                "fewer --workers or a smaller --batch-size, and run this again"
            ) from error


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


@main.command()
@click.argument("model", type=DIRECTORY)
@click.argument("source", type=DIRECTORY)
@click.argument("out", type=DIRECTORY)
@_thumbnails
@batch_size_option
@workers_option
@device_option
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
@click.argument("paths", type=DIRECTORY, nargs=-1, required=True, metavar="[MODEL] SOURCE INDEX")
@click.option(
    "--target-recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the ten nearest images that the search must find; 1: exact.",
)
@click.option(
    "--max-memory",
    callback=parse_size_option,
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
@batch_size_option
@workers_option
@device_option
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
    given = {n for n in options if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    if remove is not None:
        if len(paths) != 1 or append or given - {"device"}:
            raise click.UsageError("--remove takes the INDEX only, and --device")
        from clip_retrieval.change import remove as run

        keys = {line.strip() for line in remove if line.strip()}
        click.echo(json.dumps(run(paths[0], keys, device=options["device"])))
        return
    if len(paths) not in (2, 3):
        raise click.UsageError("expected [MODEL] SOURCE INDEX")
    model, source, index = (None, *paths) if len(paths) == 2 else paths
    from clip_retrieval.embeddings import is_embeddings

    if options["thumbnails"] and is_embeddings(source):
        raise click.UsageError(f"{source} holds embeddings; give --thumbnails to `embed`")
    if append:
        for name in ("target_recall", "max_memory", "family"):
            options.pop(name)
            if name in given:
                raise click.UsageError(f"--append keeps the --{name.replace('_', '-')} of INDEX")
        from clip_retrieval.change import append as add

        result = add(model, source, index, **options)
    else:
        from clip_retrieval.build import build_index

        result = build_index(model, source, index, **options)
    click.echo(json.dumps(result))


@main.command()
@click.argument("out", type=DIRECTORY)
@click.argument("indexes", type=DIRECTORY, nargs=-1, required=True)
@device_option
def merge(**arguments: Any) -> None:
    """Build one index, OUT, of the rows of several INDEXES of the same model."""
    from clip_retrieval.change import merge as run

    click.echo(json.dumps(run(**arguments)))


@main.command()
@click.argument("index", type=DIRECTORY)
def info(index: Path) -> None:
    """What INDEX is: its model, plan, measured recall, parts and bytes."""
    from clip_retrieval.verify import describe_index

    click.echo(json.dumps(describe_index(index), indent=1))


@main.command()
@click.argument("index", type=DIRECTORY)
def verify(index: Path) -> None:
    """Whether the index, metadata and embeddings of INDEX agree; exit status 1 if not."""
    from clip_retrieval.verify import verify_index

    result = verify_index(index)
    click.echo(json.dumps(result))
    if result["faults"]:
        raise SystemExit(1)


for command in (query, serve, eval_command):
    main.add_command(command)
