"""The paper's laws refitted from its figures, beside what it prints."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from architectures import published
from errors import ScalingError
from fits import at
from law import Law, laws
from points import Point, read_points
from settings import Settings

EXPONENT, PREFACTOR, ACCURACY, SUM = 0.005, 0.01, 0.006, 0.0005


def check(folder: Path) -> list[dict[str, Any]]:
    """Every figure expected beside the refitted one: {what, expected, refitted, off, limit, ok}.

    `folder` holds the tables that come with the tool, or a copy. Exponents agree within 0.005,
    prefactors within 1%, predictions within 0.006 points; sums of the typed figures guard those
    that no law depends on.

    Raises:
        ScalingError: a table is bad.
    """
    try:
        return list(_compare(folder))
    except ScalingError:
        raise
    except (KeyError, ValueError) as error:
        raise ScalingError(f"{folder}: a column, model or figure is missing: {error}") from error


def _compare(folder: Path) -> Iterator[dict[str, Any]]:
    gmacs = {model: float(row["gmacs"]) for model, row in published(folder).items()}

    @cache
    def table(name: str) -> list[Point]:
        points = read_points(folder / f"{name}.csv", percent=True)
        return [replace(p, gmacs=gmacs[p.model]) for p in points]

    @cache
    def law(name: str, quantity: str, group: str, rule: str) -> Law:
        settings = Settings(points=rule, bootstrap=0)
        members = [p for p in table(name) if p.quantity == quantity and p.group == group]
        if not members:
            raise ScalingError(f"{folder / name}.csv: no {quantity} of {group}")
        return laws(members, settings)[0]

    for row in _rows(folder / "laws.csv"):
        fitted = law(row["table"], row["quantity"], row["group"], row["rule"])
        line = fitted.line or (float("nan"), float("nan"))
        name = f"{row['table']} {row['quantity']} {row['group']}"
        yield _line(f"{name}: exponent", float(row["exponent"]), line[1], EXPONENT)
        printed, refitted = float(row["prefactor"]), 10 ** line[0]
        yield _line(f"{name}: prefactor", printed, refitted, PREFACTOR * printed)
    for row in _rows(folder / "sums.csv"):
        members = [
            p
            for p in table(row["table"])
            if p.quantity == row["quantity"] and p.group == row["group"]
        ]
        total = sum(100 * (1 - p.error) for p in members)
        name = f"{row['table']} {row['quantity']} {row['group']}: sum of {len(members)} figures"
        yield _line(name, float(row["sum"]), total, SUM)
    for row in _rows(folder / "predictions.csv"):
        fitted = law("zero_shot", row["quantity"], "openclip", "binned")
        compute = gmacs[row["model"]] * float(row["samples_seen"])
        accuracy = 100 * (1 - at(fitted, compute)["error"])
        name = f"{row['quantity']} of {row['model']} at {float(row['samples_seen']):.2e}"
        yield _line(f"{name} ({row['source']})", float(row["accuracy"]), accuracy, ACCURACY)


def format_check(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'':{width}}  {'expected':>9}  {'refitted':>10}  {'off':>8}  {'limit':>8}"]
    for row in rows:
        lines.append(
            f"{row['what']:{width}}  {row['expected']:>9g}  {row['refitted']:>10.6g}  "
            f"{row['off']:>8.2g}  {row['limit']:>8.2g}{'' if row['ok'] else '  MISS'}"
        )
    return "\n".join(lines)


def _line(what: str, expected: float, refitted: float, limit: float) -> dict[str, Any]:
    off = abs(refitted - expected)
    return {
        "what": what,
        "expected": expected,
        "refitted": float(f"{refitted:.6g}"),
        "off": float(f"{off:.2g}"),
        "limit": float(f"{limit:.2g}"),
        "ok": off <= limit,  # False for NaN
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
