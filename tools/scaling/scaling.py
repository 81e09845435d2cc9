"""Scaling laws of CLIP models from tables of results.

uv run tools/scaling/scaling.py fit points.csv --json fit.json
uv run tools/scaling/scaling.py predict fit.json --model ViT-G-14 --samples 68e9
uv run tools/scaling/scaling.py plot fit.json fit.svg

JSON on stdout, warnings on stderr; exit 1 is an expected failure in one line.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from errors import ScalingError
from settings import Settings

logger = logging.getLogger(__name__)
PUBLISHED = Path(__file__).parent / "published"
TABLE = click.Path(path_type=Path, allow_dash=True)
FILE = click.Path(path_type=Path)


class _Group(click.Group):
    """Expected failures become one line and exit 1; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ScalingError, OSError) as error:
            raise click.ClickException(str(error)) from error


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each field of Settings."""
    for field in reversed(fields(Settings)):
        option = dict(field.metadata)
        if "choices" in option:
            option["type"] = click.Choice(option.pop("choices"))
        elif "least" in option:
            number = click.FloatRange if isinstance(field.default, float) else click.IntRange
            option["type"] = number(min=option.pop("least"))
        elif isinstance(field.default, bool):
            option["is_flag"] = True
        name = "--" + field.name.replace("_", "-")
        shown = not option.get("multiple") and not option.get("is_flag")
        command = click.option(name, default=field.default, show_default=shown, **option)(command)
    return command


_metric = click.option(
    "--metric",
    multiple=True,
    help="Only this quantity: consecutive parts of TASK/DATASET/METRIC; can be given again.",
)
_percent = click.option("--percent", is_flag=True, help="The table's values are percentages.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Scaling laws from tables of results: E = a C^b, C the compute of the training in GMAC."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@main.command()
@click.argument("table", type=TABLE)
@_settings_options
@_percent
@click.option("--json", "output", type=FILE, help="Write the fits here; print a line for each.")
@click.option("--plot", "picture", type=FILE, help="Also plot them: a .png, .svg or .pdf.")
def fit(
    table: Path, percent: bool, output: Path | None, picture: Path | None, **settings: Any
) -> None:
    """Fit a law to every quantity and group in the CSV file TABLE (`-`: standard input).

    A long table has a row for each measurement: run, model, group, data, data_size, samples_seen,
    gmacs, task, dataset, metric, value, n_eval, seed. A wide one has a column for each quantity in
    place of task to n_eval. Needed are model, samples_seen, and metric and value or a quantity;
    gmacs also, but for models of the paper.
    """
    from fits import fit_points
    from points import read_points

    chosen = Settings(**settings)
    fitted = fit_points(read_points(table, chosen.metric, percent), chosen)
    if output is None:
        click.echo(json.dumps(fitted))
    else:
        _write(output, (json.dumps(fitted) + "\n").encode())
        for law in fitted["fits"]:
            shown = ("quantity", "group", "verdict", "prefactor", "exponent", "interval_95", "runs")
            click.echo(json.dumps({key: law[key] for key in shown}))
    if picture is not None:
        from fits import laws_of

        _plot(laws_of(fitted, str(table)), picture)


@main.command()
@click.argument("fits", type=FILE)
@click.option("--model", help="A model of the fit or of the paper; gives its GMACs.")
@click.option("--gmacs", type=click.FloatRange(0, min_open=True), help="GMACs of one pair.")
@click.option(
    "--samples",
    required=True,
    type=click.FloatRange(0, min_open=True),
    help="Samples seen in training, such as 68e9.",
)
@_metric
def predict(
    fits: Path, model: str | None, gmacs: float | None, samples: float, metric: tuple[str, ...]
) -> None:
    """Predict a run from FITS, the file of `fit --json`, one JSON line for each law.

    The interval is that of the law; single runs scatter around it. A prediction more than half a
    decade of compute beyond the runs carries a warning.
    """
    from fits import gmacs_of, predict, read_fits

    if (model is None) == (gmacs is None):
        raise click.UsageError("give either --model or --gmacs")
    fitted = read_fits(fits)
    pair = gmacs if gmacs is not None else gmacs_of(fitted, str(model))
    for said in predict(fitted, pair * samples, metric):
        click.echo(json.dumps({"model": model, "samples_seen": samples, "gmacs": pair, **said}))
        if "warning" in said:
            logger.warning("%s, %s: %s", said["quantity"], said["group"], said["warning"])


@main.command()
@click.argument("table", type=TABLE)
@click.option(
    "--margin",
    default=0.004,
    show_default=True,
    type=click.FloatRange(0),
    help="Errors closer than this count as equal; the paper's trials differ by 0.004.",
)
@_metric
@_percent
def frontier(table: Path, margin: float, metric: tuple[str, ...], percent: bool) -> None:
    """Say which runs of TABLE are best for their compute, and what limits the others.

    A run is limited by data where its model does better, as long, on other data; by samples or by
    its model where a smaller or a larger model on the same data does better for no more compute.
    """
    from frontier import frontier
    from points import read_points

    for group in frontier(read_points(table, metric, percent), margin):
        click.echo(json.dumps(group))


@main.command()
@click.argument("fits", type=FILE)
@_metric
def compare(fits: Path, metric: tuple[str, ...]) -> None:
    """Compare the exponents of every two groups in FITS, the file of `fit --json`."""
    from fits import compare, read_fits

    for difference in compare(read_fits(fits), metric):
        click.echo(json.dumps(difference))


@main.command()
@click.argument("config")
def profile(config: str) -> None:
    """Compute GMACs and parameters of CONFIG in closed form.

    CONFIG is a model of the paper, a JSON file with open_clip's model_cfg or a model directory.
    """
    from architectures import model_config, profile

    click.echo(json.dumps(profile(model_config(config))))


@main.command()
@click.option(
    "--tables",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=PUBLISHED,
    help="Folder of the published tables; default: those that come with the tool.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table to read, or a JSON line for each figure.",
)
def check(tables: Path, style: str) -> None:
    """Refit the paper's laws from its figures; exit 1 if one is missed."""
    from check import check, format_check

    rows = check(tables)
    click.echo(format_check(rows) if style == "table" else "\n".join(map(json.dumps, rows)))
    missed = [row["what"] for row in rows if not row["ok"]]
    if missed:
        raise ScalingError(f"{len(missed)} of {len(rows)} figures missed: {'; '.join(missed)}")
    logger.info("all %d figures met", len(rows))


@main.command()
@click.argument("fits", type=FILE)
@click.argument("picture", type=FILE)
@_metric
def plot(fits: Path, picture: Path, metric: tuple[str, ...]) -> None:
    """Plot FITS, the file of `fit --json`, to PICTURE: a .png, .svg or .pdf.

    Colour is the model, marker the data, size the samples seen; runs that do not carry the law
    are faint; the band is the law's 95% interval, and the line is dashed beyond the runs.
    """
    from fits import read_fits

    _plot(read_fits(fits), picture, metric)


def _plot(fitted: list[Any], picture: Path, metric: tuple[str, ...] = ()) -> None:
    from plots import plot

    _write(picture, plot(fitted, picture.suffix, metric))
    logger.info("wrote %s", picture)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


if __name__ == "__main__":
    main()
