"""The commands of a study, and what they measured as rows of points.csv.

A step is the file that it leaves in OUT, and the command whose output the file is.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from points import distinct
from study_grid import Cell, recipe_options, recipes

Step = tuple[str, list[str]]
COLUMNS = (
    *("run", "model", "group", "data", "data_size", "samples_seen", "gmacs"),
    *("task", "dataset", "metric", "value", "n_eval", "seed"),
)
DEMO_DATA = Path(__file__).parent.parent / "demo_data.py"
WAYS = ("image_retrieval_recall@5", "text_retrieval_recall@5")


def options(values: Mapping[str, Any]) -> list[str]:
    """As a command line has them; true is a flag."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def demo_steps(grid: dict[str, Any], out: Path, python: str) -> list[list[list[Step]]]:
    """Pictures, shards, sets and subsets: stages, each of tasks that may run side by side."""
    demo = out / "demo"
    label = ["--label-column", "label", "--classnames", str(demo / "classnames.txt")]
    label += ["--templates", str(demo / "templates.txt")]

    def build(table: str, target: str, *more: str) -> list[Step]:
        source, name = str(demo / f"{table}.jsonl"), f"log/{table}.json"
        return [(name, ["clip-data", "build", source, str(out / target), "--workers", "1", *more])]

    sets = [build("train", "shards", "--samples-per-shard", "500", "--shuffle-seed", "0")]
    for style, splits in (("twemoji", ("train", "val", "test")), ("noto", ("test",))):
        # one after another: they share the set's class names
        sets.append(
            [
                step
                for split in splits
                for step in build(
                    f"categories-{style}-{split}", f"sets/{style}", "--split", split, *label
                )
            ]
        )
        sets.append(build(f"retrieval-{style}-all", f"sets/{style}-names", "--split", "all"))
    render = [python, str(DEMO_DATA), str(demo), "--size", str(grid["demo-size"])]
    subset = ["clip-data", "subset", str(out / "shards")]
    drawn = ["--seed", str(grid["seed"]), "--workers", "1"]

    def draw(pairs: int) -> Step:
        target = str(out / "data" / str(pairs))
        return f"log/subset-{pairs}.json", [*subset, target, "--samples", str(pairs), *drawn]

    return [[[("log/demo.json", render)]], sets, [[draw(pairs)] for pairs in grid["pairs"]]]


def train_command(grid: dict[str, Any], cell: Cell, out: Path) -> list[str]:
    """clip-train's, for one process."""
    shards = out / "data" / str(cell.pairs)
    if "data" in grid:
        shards = out / grid["data"][cell.data]["shards"]
    words = ["clip-train", *options(cell.train), "--train-data", str(shards)]
    if "recipe" not in cell.train:
        words += ["--model", str(out / "models" / f"{cell.model}.json")]
    return [*words, "--output", str(out / "cells" / cell.name / "run")]


def dry_runs(grid: dict[str, Any], out: Path) -> list[Step]:
    """What clip-train says of every recipe of the grid."""
    steps: list[Step] = []
    for data, recipe in recipes(grid):
        cell = Cell(recipe, "", data, 0, 0, 0.0, recipe_options(grid, recipe))
        steps.append(dry_run(grid, cell, out))
    return steps


def dry_run(grid: dict[str, Any], cell: Cell, out: Path) -> Step:
    return f"plan/{cell.name}.json", [*train_command(grid, cell, out), "--dry-run"]


def cell_steps(grid: dict[str, Any], cell: Cell, out: Path) -> list[Step]:
    """Train, then measure, each step on the model that the first one leaves."""
    home = out / "cells" / cell.name
    model, tuned = str(home / "run" / "model"), str(home / "tuned")

    def sets(*tables: str) -> list[str]:
        named = [name for table in tables for name in grid.get(table, {}).get("sets", [])]
        return [str(out / name) for name in dict.fromkeys(named)]

    def more(table: str) -> list[str]:
        return options({k: v for k, v in grid[table].items() if k not in ("sets", "shots")})

    def zero_shot(model: str, *tables: str) -> list[str]:
        return ["clip-probe", "zeroshot", model, *sets(*tables), *more("zero-shot")]

    steps = [("train.json", train_command(grid, cell, out))]
    steps.append(("zero-shot.jsonl", zero_shot(model, "zero-shot", "robustness")))
    if "retrieval" in grid:
        words = ["clip-retrieval", "eval", model, *sets("retrieval"), "--recall-k", "5"]
        steps.append(("retrieval.jsonl", words + more("retrieval")))
    for path in sets("probe"):
        shots = ",".join(map(str, grid["probe"]["shots"]))
        words = ["clip-probe", "sweep", model, path, "--shots", shots]
        steps.append((f"probe-{Path(path).name}.json", words + more("probe")))
    if "fine-tune" in grid:
        tasks = [word for path in sets("fine-tune") for word in ("--task", path)]
        words = ["clip-finetune", "train", model, tuned, *tasks, "--seed", str(grid["seed"])]
        steps.append(("fine-tune.json", words + more("fine-tune")))
        steps.append(("fine-tune.jsonl", zero_shot(tuned, "fine-tune")))
    return [(f"cells/{cell.name}/{file}", command) for file, command in steps]


def points_csv(grid: dict[str, Any], cells: Sequence[Cell], out: Path) -> str:
    """A row for each measurement of each cell, in the long schema of this folder's README."""
    stream = io.StringIO()
    table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    table.writeheader()
    for cell in cells:
        trained = _read(out / "cells" / cell.name / "train.json")[0]
        about = {"run": cell.name, "model": cell.model, "group": grid["name"], "data": cell.data}
        about |= {"data_size": cell.pairs, "samples_seen": trained["samples"]}
        about |= {"gmacs": cell.gmacs, "seed": grid["seed"]}
        for task, dataset, metric, value, count in _measured(grid, out / "cells" / cell.name):
            found = {"task": task, "dataset": dataset, "metric": metric, "n_eval": count}
            table.writerow(about | found | {"value": round(value, 6)})
    return stream.getvalue()


def fittable(points: str) -> str:
    """points.csv as far as laws can be fitted to it.

    An error of zero has no logarithm, and a quantity of fewer than three computes no law.
    """
    rows = [row for row in csv.DictReader(io.StringIO(points)) if float(row["value"]) < 1]
    computes: dict[str, list[float]] = {}
    for row in rows:
        compute = float(row["gmacs"]) * float(row["samples_seen"])
        computes.setdefault(quantity(row), []).append(compute)
    stream = io.StringIO()
    table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(row for row in rows if distinct(computes[quantity(row)]) >= 3)
    return stream.getvalue()


def quantity(row: Mapping[str, str]) -> str:
    return f"{row['task']}/{row['dataset']}/{row['metric']}"


def _measured(grid: dict[str, Any], home: Path) -> Iterator[tuple[str, str, str, float, int]]:
    """(task, dataset, metric, value, samples that it is a mean over)."""
    scores = {Path(row["dataset"]).name: row for row in _read(home / "zero-shot.jsonl")}
    for task in ("zero-shot", "robustness"):
        for name in _names(grid, task):
            yield task, name, "acc1", scores[name]["acc1"], scores[name]["samples"]
    if "retrieval" in grid:
        for row in _read(home / "retrieval.jsonl"):
            for way in WAYS:
                value, count = row["metrics"][way], row["queries"][way]
                yield "retrieval", Path(row["dataset"]).name, way, value, count
    for name in _names(grid, "probe"):
        row = _read(home / f"probe-{name}.json")[0]
        full = row["full"]
        for few in row["few_shot"]:  # a mean over draws; all of them tested on the same samples
            yield f"{few['shots']}-shot", name, "acc1", few["acc1_mean"], row["samples"]["test"]
        yield "full-probe", name, "acc1", full["acc1"], row["samples"]["test"]
    if "fine-tune" in grid:
        for row in _read(home / "fine-tune.jsonl"):
            yield "fine-tune", Path(row["dataset"]).name, "acc1", row["acc1"], row["samples"]


def _names(grid: dict[str, Any], table: str) -> list[str]:
    return [Path(name).name for name in grid.get(table, {}).get("sets", [])]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
