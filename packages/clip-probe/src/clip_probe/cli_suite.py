"""Commands about many results: suites, their comparison, robustness to shift."""

import json
from pathlib import Path
from typing import Any

import click

from clip_probe.cli_options import FOLDER, encoding_options, load


@click.command()
@click.argument("file", metavar="SUITE.toml", type=FOLDER)
@click.argument("output", metavar="OUT", type=FOLDER)
@encoding_options
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

    click.echo(json.dumps(suite(file, output, lambda path: load(path, device), **options)))


@click.command()
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


@click.command()
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
