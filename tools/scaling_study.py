"""A study of the paper's shape: train a grid of models, measure each, fit the laws.

    uv run tools/scaling_study.py OUT                    on a laptop, in 25 minutes on two cores
    uv run tools/scaling_study.py OUT --grid tools/scaling/paper.toml --engine slurm

Only commands are called, of the six tools and of tools/scaling. Each leaves one file in OUT and is
skipped where that is there, so a study that was stopped continues. tools/scaling/README.md tells of
the grid and of what is written.
"""

import csv
import io
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import click

SCALING = Path(__file__).resolve().parent / "scaling"
sys.path.insert(0, str(SCALING))

from errors import ScalingError  # noqa: E402
from study_cells import Step, cell_steps, demo_steps, dry_runs, fittable, points_csv  # noqa: E402
from study_grid import (  # noqa: E402
    Cell,
    affordable,
    product_cell,
    product_cells,
    read_grid,
    recipe_cells,
    subsets,
)
from study_report import families, write_report  # noqa: E402
from study_run import Runner, StoppedError, times, write_whole  # noqa: E402
from study_slurm import write_jobs  # noqa: E402

logger = logging.getLogger(__name__)
STOPPED = 3  # exit status, as clip-train's
TIMED_STEPS = 10
SLACK = 0.93  # of the time given: fits and plots, and tasks that do not end together


class _Command(click.Command):
    """Expected failures become one line and exit 1, a signal exit 3."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ScalingError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except (KeyboardInterrupt, StoppedError):
            logger.info("stopped; the same command continues")
            raise click.exceptions.Exit(STOPPED) from None


@click.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--grid",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=SCALING / "study.toml",
    help="The grid, a TOML file; default: the laptop's, tools/scaling/study.toml.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=25,
    show_default=True,
    help="Ten steps of each model are timed first, and if the grid would take longer than this, "
    "all samples seen are shrunk by one factor. OUT/study.json records it.",
)
@click.option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    help="Times the grid's samples seen, whatever it takes; nothing is timed.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Commands side by side, of one thread each.  [default: one per core]",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="Run here; or check every run with clip-train --dry-run and write job arrays.",
)
@click.option("--cell", help="Run this cell of OUT alone, as the job arrays do.")
def main(
    out: Path,
    grid: Path,
    minutes: float,
    scale: float | None,
    jobs: int | None,
    engine: str,
    cell: str | None,
) -> None:
    """Run the study of a grid in OUT: points.csv, fits, plots, report.md and report.html."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    tables, out = read_grid(grid), out.resolve()
    if cell is not None:
        _run_cell(tables, out, cell)
        return
    with Runner(out, "lock", jobs or len(os.sched_getaffinity(0)), threads=1) as runner:
        cells = _recorded(tables, out, scale)
        if cells is None:
            _prepare(tables, runner)
            left = None if engine == "slurm" else 60 * minutes - (time.monotonic() - started)
            cells = _record(tables, runner, scale, left)
        if engine == "slurm":
            click.echo(json.dumps(write_jobs(tables, cells, grid.resolve(), runner)))
            return
        longest_first = sorted(cells, key=lambda each: -each.compute)
        runner.run([cell_steps(tables, each, out) for each in longest_first], "run")
        _conclude(tables, cells, runner)
        if not runner.ran:
            logger.info("nothing left to do; remove %s to start again", out)
    click.echo((out / "summary.json").read_text(), nl=False)


def _recorded(grid: dict[str, Any], out: Path, scale: float | None) -> list[Cell] | None:
    """The cells in OUT/study.json; None where there is no such file.

    Raises:
        ScalingError: they are of another grid or scale.
    """
    record = out / "study.json"
    if not record.exists():
        return None
    study = json.loads(record.read_text())
    if study["grid"] != grid:
        raise ScalingError(f"{out}: holds the study of another grid; choose another OUT")
    if scale not in (None, study["scale"]):
        raise ScalingError(f"{out}: holds the study at --scale {study['scale']:g}")
    return [Cell(**cell) for cell in study["cells"]]


def _prepare(grid: dict[str, Any], runner: Runner) -> None:
    """The demo data, and the models' configurations as clip-train reads them."""
    for stage in demo_steps(grid, runner.out, sys.executable) if "demo-size" in grid else []:
        runner.run(stage)
    (runner.out / "models").mkdir(exist_ok=True)
    for name, table in grid.get("models", {}).items():
        config = {key: value for key, value in table.items() if key != "gmacs"}
        write_whole(runner.out / "models" / f"{name}.json", json.dumps(config) + "\n")


def _record(
    grid: dict[str, Any], runner: Runner, scale: float | None, time_left: float | None
) -> list[Cell]:
    """Settle the cells, once and for all.

    Args: time_left: seconds, to which samples seen are shrunk where `scale` is not given.
    """
    if "recipes" in grid:
        steps = dry_runs(grid, runner.out)
        runner.run([[step] for step in steps], "dry run")
        plans = [json.loads((runner.out / file).read_text()) for file, _ in steps]
        chosen, cells = 1.0, recipe_cells(grid, plans)
    else:
        chosen = scale or (1.0 if time_left is None else _timed(grid, runner, time_left))
        cells = product_cells(grid, chosen)
    study = {"scale": chosen, "grid": grid, "cells": [asdict(cell) for cell in cells]}
    write_whole(runner.out / "study.json", json.dumps(study, indent=1) + "\n")
    return cells


def _timed(grid: dict[str, Any], runner: Runner, time_left: float) -> float:
    """The share of the grid's samples seen that the time is enough for, at most 1.

    Each model trains ten steps on all data and is measured as its cells will be.
    """
    started = time.monotonic()
    batch, folder = grid["train"]["batch-size"], runner.out / "cells"
    most = max(subsets(grid), key=subsets(grid).__getitem__)
    tasks: list[list[Step]] = []
    for model in grid["models"]:
        shutil.rmtree(folder / f"timing-{model}", ignore_errors=True)
        cell = product_cell(grid, model, most, TIMED_STEPS * batch)
        cell = replace(cell, name=f"timing-{model}", train=cell.train | {"log-every": 1})
        tasks.append(cell_steps(grid, cell, runner.out))
    runner.run(tasks, "timed")
    each, fixed = {}, {}  # seconds of a sample, and of everything else about a cell
    for model in grid["models"]:
        metrics = (folder / f"timing-{model}" / "run" / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line)["samples_per_second"] for line in metrics]
        each[model] = 1 / median(rates[2:])
        training = TIMED_STEPS * batch * each[model]
        took = sum(times(folder / f"timing-{model}").values())
        fixed[model] = max(0.0, took - training)
        shutil.rmtree(folder / f"timing-{model}")
    left = time_left - (time.monotonic() - started)
    return affordable(product_cells(grid, 1.0), each, fixed, SLACK * runner.jobs * left)


def _conclude(grid: dict[str, Any], cells: list[Cell], runner: Runner) -> None:
    """points.csv, the fits and plots from it, and the report; all anew where points.csv changes."""
    out, python = runner.out, sys.executable
    points = points_csv(grid, cells, out)
    fitted = fittable(points)
    measured = {row["task"] for row in csv.DictReader(io.StringIO(fitted))}
    tool = [python, str(SCALING / "scaling.py")]
    largest = max(cell.compute for cell in cells)
    held = str(sum(cell.compute == largest for cell in cells))
    table = str(out / "fitted.csv")
    fit = [*tool, "fit", table, "--points", "pareto", "--holdout-largest", held]
    steps = [("log/fit.jsonl", [*fit, "--json", str(out / "fit.json")])]
    for name, tasks in families(grid, measured).items():
        chosen = [word for task in tasks for word in ("--metric", task)]
        picture = str(out / "plots" / f"{name}.png")
        steps.append(
            (f"log/plot-{name}.txt", [*tool, "plot", str(out / "fit.json"), picture, *chosen])
        )
    steps.append(("frontier.jsonl", [*tool, "frontier", table]))
    if not runner.done("points.csv") or (out / "points.csv").read_text() != points:
        for file in (*(file for file, _ in steps), "report.html"):
            (out / file).unlink(missing_ok=True)
        write_whole(out / "fitted.csv", fitted)
        write_whole(out / "points.csv", points)
    (out / "plots").mkdir(exist_ok=True)
    runner.run([steps])
    if not runner.done("report.html"):
        write_report(json.loads((out / "study.json").read_text()), out)
    if "recipes" not in grid:  # as large as the models, and needed no more
        for cell in cells:
            for name in ("run/state", "tuned", "tuned.state"):
                shutil.rmtree(out / "cells" / cell.name / name, ignore_errors=True)


def _run_cell(grid: dict[str, Any], out: Path, name: str) -> None:
    """One cell of a study that is recorded, with all the threads that there are."""
    found = [cell for cell in _recorded(grid, out, None) or [] if cell.name == name]
    if not found:
        raise ScalingError(f"{out}/study.json: no cell {name!r}; --engine slurm records the cells")
    with Runner(out, f"cells/{name}/lock", jobs=1, threads=None) as runner:
        runner.run([cell_steps(grid, found[0], out)])


if __name__ == "__main__":
    main()
