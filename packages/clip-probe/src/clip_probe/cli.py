"""The command line of clip-probe."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click
from clip_models import ModelError, without_shutdown

from clip_probe.cli_options import FOLDER, detail_options, encoding_options, load, text_options
from clip_probe.cli_suite import compare, robustness, suite
from clip_probe.errors import ProbeError


class _Group(click.Group):
    """Turns the package's expected failures into one line on stderr and exit code 1."""

    def main(self, *args: Any, **options: Any) -> Any:
        with without_shutdown():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return super().invoke(ctx)
            from clip_probe import features, processes

            with processes.joined():
                return features.serve() if processes.rank() else super().invoke(ctx)
        except (ProbeError, ModelError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise click.ClickException(
                f"a process that decodes images was lost ({error}); if memory ran out, ask for "
                "fewer --workers or a smaller --batch-size, and run this again"
            ) from error


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
@text_options
@detail_options
@encoding_options
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
    for result in zeroshot(load(model, device), sets, details=details, **options):
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
@detail_options
@encoding_options
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
    for result in evaluate_heads(load(model, device), sets, heads, details=details, **options):
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
    "--solver",
    type=click.Choice(["lbfgs", "sklearn", "adam"]),
    default="lbfgs",
    show_default=True,
    help="lbfgs and sklearn reach the same optimum, the first all fits at once; adam trains a grid "
    "of learning rates, epochs and weight decays, batch 256.",
)
@click.option(
    "--tolerance",
    default=1e-7,
    show_default=True,
    help="lbfgs stops a fit this far above its optimum, as a part of it; 1e-4 takes half the time.",
)
@click.option(
    "--start",
    type=click.Choice(["random", "zero-shot"]),
    default="random",
    show_default=True,
    help="Where adam starts: a random layer or the zero-shot head.",
)
@click.option(
    "--paper",
    is_flag=True,
    help="The paper's protocol: adam without weight decay, learning rates 0.1, 0.01, 0.001 by 10, "
    "20, 40 epochs, the best chosen on the TEST split; the result says so.",
)
@click.option(
    "--save-head", metavar="NAME", help="Save the full-data probe as a head of MODEL of this name."
)
@click.option(
    "--output",
    type=FOLDER,
    metavar="DIR",
    help="Write the result, its table, accuracy by shots and a map of the grid to DIR; an "
    "interrupted sweep continues there.",
)
@text_options
@encoding_options
def sweep(model: Path, dataset: Path, save_head: str | None, device: str, **options: Any) -> None:
    """Fit linear probes on the features of SET: full data and few shots.

    The probes are L2-regularised multinomial logistic regressions (scikit-learn's objective) on
    L2-normalised features, for a grid of C from 0.01 to 1e6. C is chosen on the validation split;
    without one, on a fifth of the training images (full data) or by cross-validation within the
    images drawn (few shots; C = 1 for one shot). The full-data probe is then fitted again on
    training and validation images together. The test split chooses nothing, but with --paper.
    """
    from clip_probe.sweeps import sweep

    result = sweep(load(model, device), dataset, head_name=save_head, **options)
    click.echo(json.dumps(result))


for command in (suite, compare, robustness):
    main.add_command(command)
