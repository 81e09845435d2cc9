"""The command line of clip-probe."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from clip_models import ModelError

from clip_probe.errors import ProbeError

if TYPE_CHECKING:
    from clip_models import LoadedModel

FOLDER = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns the package's expected failures into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return super().invoke(ctx)
            from clip_probe import features, processes

            with processes.joined():
                return features.serve() if processes.rank() else super().invoke(ctx)
        except (ProbeError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error


class _Shots(click.ParamType[tuple[int, ...]]):
    name = "N,N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part for part in str(value).split(",") if part]
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is no list of positive numbers such as 1,2,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


def _encoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """How images are read and encoded; the same for every command."""
    for decorate in reversed(
        [
            click.option(
                "--batch-size",
                default=64,
                show_default=True,
                type=click.IntRange(1),
                help="Images encoded at once.",
            ),
            click.option(
                "--workers",
                default=2,
                show_default=True,
                type=click.IntRange(0),
                help="Processes that decode images; 0 decodes in the main process.",
            ),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Where the model runs; auto takes cuda where there is one.",
            ),
            click.option(
                "--precision",
                type=click.Choice(["fp32", "bf16"]),
                default="fp32",
                show_default=True,
                help="Of the image tower; scores are always computed in float32.",
            ),
            click.option(
                "--cache",
                type=FOLDER,
                metavar="DIR",
                help="Keep features here: no image is encoded twice by one model, and what was "
                "interrupted continues.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def _detail_options(command: Callable[..., None]) -> Callable[..., None]:
    """Files about each head on each set."""
    for decorate in (
        click.option(
            "--save-predictions",
            is_flag=True,
            help="With --output, also predictions.parquet: what was said of each image.",
        ),
        click.option(
            "--output",
            type=FOLDER,
            metavar="DIR",
            help="Write tables by class, the confusion matrix and a reliability plot to DIR/SET.",
        ),
    ):
        command = decorate(command)
    return command


def _load(model: Path, device: str) -> "LoadedModel":
    import torch
    from clip_models import load_model

    from clip_probe.features import place

    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ProbeError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return load_model(model, device=place("cuda" if cuda and device != "cpu" else "cpu"))


@click.group(cls=_Group)
@click.version_option(package_name="clip-probe")
def main() -> None:
    """Zero-shot and linear-probe evaluation of CLIP models.

    MODEL is a model directory; SET a labelled set in CLIP_benchmark's layout (classnames.txt,
    zeroshot_classification_templates.txt, SPLIT/nshards.txt, SPLIT/0.tar …), or one of its sets on
    the hub: wds/NAME or hf-hub:OWNER/NAME, from the hub's cache with HF_HUB_OFFLINE=1. Results are
    JSON on stdout. Under `accelerate launch -m clip_probe` or torchrun all processes encode into
    --cache, and the first does the rest.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("sets", metavar="SET...", nargs=-1, required=True, type=FOLDER)
@click.option("--split", default="test", show_default=True, help="The split to evaluate.")
@click.option(
    "--templates",
    metavar="FILE|NAME",
    help="Prompt templates, one a line with {c} for the class name, or a list known by name "
    "(general, openai-imagenet, simple-imagenet), instead of the sets' own.",
)
@click.option(
    "--classnames",
    metavar="FILE|NAME",
    help="Class names, one a line, or a list known by name (imagenet), instead of the sets' own.",
)
@_detail_options
@_encoding_options
def zeroshot(
    model: Path,
    sets: tuple[Path, ...],
    output: Path | None,
    save_predictions: bool,
    device: str,
    **options: Any,
) -> None:
    """Classify images by the prompts of their class names: one JSON line per SET."""
    from clip_probe.evaluate import Details, zeroshot

    details = Details(output, save_predictions)
    for result in zeroshot(_load(model, device), sets, details=details, **options):
        click.echo(json.dumps(result))


@main.command("eval")
@click.argument("model", type=FOLDER)
@click.argument("sets", metavar="SET...", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--head",
    "heads",
    multiple=True,
    required=True,
    help="A head of MODEL (heads/NAME.safetensors); may be given several times.",
)
@click.option("--split", default="test", show_default=True, help="The split to evaluate.")
@_detail_options
@_encoding_options
def evaluate(
    model: Path,
    sets: tuple[Path, ...],
    heads: tuple[str, ...],
    output: Path | None,
    save_predictions: bool,
    device: str,
    **options: Any,
) -> None:
    """Evaluate saved heads: one JSON line per SET and head.

    A head fits a set whose class names are among its own, in any order. The images of a set are
    decoded once for all heads.
    """
    from clip_probe.evaluate import Details, evaluate_heads

    details = Details(output, save_predictions)
    for result in evaluate_heads(_load(model, device), sets, heads, details=details, **options):
        click.echo(json.dumps(result))


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("dataset", metavar="SET", type=FOLDER)
@click.option(
    "--train-split", default="train", show_default=True, help="The split that probes are fitted on."
)
@click.option(
    "--val-split",
    help="The split that chooses C; without it, part of the training images do (see above).",
)
@click.option("--test-split", default="test", show_default=True, help="The split that is reported.")
@click.option(
    "--shots",
    type=_Shots(),
    default="1,2,4,8,16",
    show_default=True,
    help="Training images per class of the few-shot probes; '' for none.",
)
@click.option(
    "--feature",
    type=click.Choice(["post", "pre", "pixels"]),
    default="post",
    show_default=True,
    help="Image embeddings, the tower's output before its projection, or raw pixels as a baseline.",
)
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Few-shot draws at each number of shots.",
)
@click.option(
    "--save-head", metavar="NAME", help="Save the full-data probe as a head of MODEL of this name."
)
@click.option(
    "--output", type=FOLDER, metavar="DIR", help="Write DIR/sweep.json and DIR/shots.png."
)
@_encoding_options
def sweep(model: Path, dataset: Path, save_head: str | None, device: str, **options: Any) -> None:
    """Fit linear probes on the features of SET: full data and few shots.

    The probes are L2-regularised multinomial logistic regressions (scikit-learn's objective) on
    L2-normalised features, for a grid of C from 0.01 to 1e6. C is chosen on the validation split;
    without one, on a fifth of the training images (full data) or by cross-validation within the
    images drawn (few shots; C = 1 for one shot). The full-data probe is then fitted again on
    training and validation images together. The test split chooses nothing.
    """
    from clip_probe.sweep import sweep

    result = sweep(_load(model, device), dataset, head_name=save_head, **options)
    click.echo(json.dumps(result))


@main.command()
@click.argument("file", metavar="SUITE.toml", type=FOLDER)
@click.argument("output", metavar="OUT", type=FOLDER)
@_encoding_options
def suite(file: Path, output: Path, device: str, **options: Any) -> None:
    """Evaluate models on sets as a TOML file says: zero-shot, linear probes, a report.

    \b
    [models]
    small = "runs/small/model"
    [[sets]]
    path = "sets/pets"           # also: name, split, templates, classnames
    probe = { val_split = "val" } # true, or options of sweep; without it no probe
    [probe]                      # options of sweep for every probe
    shots = [1, 4, 16]
    [averages]                   # besides VTAB+, VTAB and robustness of the paper
    mine = ["pets", "cars"]
    [robustness]
    base = "pets"                # and shifted = [...], baseline = [models]
    [retrieval]
    results = ["retrieval.jsonl"] # lines of clip-retrieval eval

    OUT/results.jsonl gets a line for each model, set and task; OUT/report.html and report.md say
    what they mean. Run again, it continues, and does again what has changed. Features are kept in
    OUT/features, unless --cache names another folder.
    """
    from clip_probe.suite import suite

    click.echo(json.dumps(suite(file, output, lambda path: _load(path, device), **options)))


@main.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--model-a", metavar="NAME", help="The model of A.  [default: those in both]")
@click.option("--model-b", metavar="NAME", help="The model of B.  [default: those in both]")
def compare(a: Path, b: Path, model_a: str | None, model_b: str | None) -> None:
    """Compare two suites, A and B, image by image: one JSON line per model, set and metric.

    A difference is B minus A. Top-1 has McNemar's exact p-value, also adjusted for the number of
    sets (Holm); all scores with predictions have the 95% interval of a paired bootstrap. A and B
    may be one folder: give its two models.
    """
    from clip_probe.compare import compare

    for row in compare(a, b, model_a, model_b):
        click.echo(json.dumps(row))


@main.command()
@click.argument(
    "results", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True)
)
@click.option("--base", required=True, metavar="SET", help="The set that others are shifted from.")
@click.option(
    "--shifted", multiple=True, metavar="SET", help="A shifted set.  [default: all others]"
)
@click.option(
    "--baseline",
    multiple=True,
    metavar="MODEL",
    help="A model that says what is usual; two or more give a line, and effective robustness.",
)
@click.option("--plot", type=FOLDER, metavar="FILE", help="Draw shifted against base accuracy.")
def robustness(
    results: tuple[Path, ...],
    base: str,
    shifted: tuple[str, ...],
    baseline: tuple[str, ...],
    plot: Path | None,
) -> None:
    """Accuracy under distribution shift: one JSON line per model.

    RESULTS are files of lines that zeroshot, eval or suite printed; - is stdin. A set goes by its
    folder's name, a model by its path and head, or by their names in the suite.
    """
    from clip_probe.files import write_file
    from clip_probe.results import read_results
    from clip_probe.robustness import plot_robustness, robustness, scores_of

    scores = scores_of([row for file in results for row in read_results(file)])
    sets = dict.fromkeys(name for by_set in scores.values() for name in by_set)
    others = shifted or tuple(name for name in sets if name != base)
    for row in robustness(scores, base, others, baseline):
        click.echo(json.dumps(row))
    if plot:
        write_file(plot, lambda to: plot_robustness(scores, base, others, baseline, to))
