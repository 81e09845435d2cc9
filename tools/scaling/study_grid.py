"""The grid of a study, read from TOML: models x subsets x samples seen, or runs of the paper.

README.md has the keys of the file.
"""

import logging
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from architectures import profile
from errors import ScalingError

logger = logging.getLogger(__name__)
COMMON = {"name", "seed", "train", "zero-shot"}
PRODUCT = COMMON | {"samples-seen", "models"}
RECIPES = COMMON | {"recipes", "data", "slurm"}
MODEL, DATA = {"embed_dim", "vision_cfg", "text_cfg"}, {"shards", "pairs"}
MEASURES = {"robustness", "retrieval", "probe", "fine-tune"}
INNER = {key: {"sets"} for key in MEASURES | {"zero-shot"}} | {
    "probe": {"sets", "shots"},
    "slurm": {"nodes", "gpus-per-node", "minutes", "options"},
}


@dataclass(frozen=True)
class Cell:
    """One run with a full schedule of its own.

    Attributes:
        model: a name; runs of one name have one configuration.
        data: the name of what it is trained on.
        pairs: how many pairs that is.
        gmacs: 1e9 multiply-accumulates of one forward pass of a pair.
        train: options of clip-train; without --recipe, its model is the configuration `model`.
    """

    name: str
    model: str
    data: str
    pairs: int
    samples_seen: int
    gmacs: float
    train: dict[str, Any]

    @property
    def compute(self) -> float:
        """Of the training, in GMAC."""
        return self.gmacs * self.samples_seen


def read_grid(path: Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        ScalingError: not TOML, or a key that is missing or unknown.
    """
    try:
        grid = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ScalingError(f"{path}: {error}") from error
    if "recipes" in grid:
        wanted, optional, train = RECIPES, MEASURES | {"extra"}, set[str]()
    else:
        wanted = PRODUCT | ({"data"} if "data" in grid else {"demo-size", "pairs"})
        optional, train = MEASURES | {"slurm"}, {"batch-size", "warmup"}
    missing = set(wanted - grid.keys())
    tables = [(name, grid.get(name), keys) for name, keys in {**INNER, "train": train}.items()]
    for kind, keys in (("models", MODEL), ("data", DATA)):
        tables += [(f"{kind}.{name}", table, keys) for name, table in grid.get(kind, {}).items()]
    for name, table, keys in tables:
        if table is not None:
            missing |= {f"[{name}] {key}" for key in keys - table.keys()}
    for what, keys in (("missing", missing), ("unknown", grid.keys() - wanted - optional)):
        if keys:
            raise ScalingError(f"{path}: {what}: {', '.join(sorted(keys))}")
    return grid


def product_cells(grid: dict[str, Any], scale: float) -> list[Cell]:
    """A cell for each model, subset and budget, `scale` times the grid's samples seen.

    Raises:
        ScalingError: so few samples that two budgets become one.
    """
    batch = grid["train"]["batch-size"]
    budgets = [max(1, round(scale * n / batch)) * batch for n in grid["samples-seen"]]
    if len(set(budgets)) < len(budgets):
        raise ScalingError(
            f"at {scale:g} of the grid's samples seen two budgets become one "
            f"({', '.join(map(str, budgets))}); give more --minutes or a smaller grid"
        )
    return [
        product_cell(grid, model, data, samples)
        for model, data, samples in product(grid["models"], subsets(grid), budgets)
    ]


def product_cell(grid: dict[str, Any], model: str, data: str, samples: int) -> Cell:
    """The cell of one model, subset and budget."""
    options = grid["train"] | {"samples-seen": samples, "seed": grid["seed"]}
    steps = math.ceil(samples / options["batch-size"])
    options["warmup"] = max(1, math.floor(options["warmup"] * steps))
    config = grid["models"][model]
    gmacs = config["gmacs"] if "gmacs" in config else profile(config)["gmacs"]
    name = f"{model}-{data.removesuffix(' pairs')}-{samples}"
    return Cell(name, model, data, subsets(grid)[data], samples, float(f"{gmacs:.6g}"), options)


def subsets(grid: dict[str, Any]) -> dict[str, int]:
    """How many pairs each of the data has that the grid's models train on."""
    if "data" in grid:
        return {name: table["pairs"] for name, table in grid["data"].items()}
    return {f"{pairs} pairs": pairs for pairs in grid["pairs"]}


def affordable(
    cells: Sequence[Cell], each: Mapping[str, float], fixed: Mapping[str, float], seconds: float
) -> float:
    """The share of the cells' samples, at most 1, that takes `seconds` of one core.

    Args:
        each, fixed: by model, seconds of a sample and of all else that a cell costs.

    Raises:
        ScalingError: all else alone takes longer.
    """
    training = sum(each[cell.model] * cell.samples_seen for cell in cells)
    measuring = sum(fixed[cell.model] for cell in cells)
    told = f"{len(cells)} runs: {training / 60:.1f} core minutes to train"
    told += f", {measuring / 60:.1f} to start and measure, {seconds / 60:.1f} left"
    scale = min(1.0, math.floor(1000 * (seconds - measuring) / training) / 1000)
    if scale <= 0:
        raise ScalingError(f"{told}; give more --minutes")
    logger.info("%s: %g of the grid's samples seen", told, scale)
    return scale


def recipe_cells(grid: dict[str, Any], plans: Iterable[dict[str, Any]]) -> list[Cell]:
    """A cell for each recipe, whose sizes are those that clip-train's --dry-run gave, in order."""
    return [
        Cell(
            name=recipe,
            model=plan["model"],
            data=data,
            pairs=grid["data"][data]["pairs"],
            samples_seen=plan["samples_seen"],
            gmacs=plan["gmacs"],
            train=recipe_options(grid, recipe),
        )
        for (data, recipe), plan in zip(recipes(grid), plans, strict=True)
    ]


def recipe_options(grid: dict[str, Any], recipe: str) -> dict[str, Any]:
    """clip-train's, those of all runs and those of this one."""
    more = grid.get("extra", {}).get(recipe, {})
    return {"recipe": recipe} | grid["train"] | more | {"seed": grid["seed"]}


def recipes(grid: dict[str, Any]) -> list[tuple[str, str]]:
    """(data, recipe) of every run.

    Raises:
        ScalingError: data without shards.
    """
    unknown = grid["recipes"].keys() - grid["data"].keys()
    if unknown:
        raise ScalingError(f"recipes on {', '.join(sorted(unknown))}, but no [data.…] of that name")
    return [(data, recipe) for data, names in grid["recipes"].items() for recipe in names]
