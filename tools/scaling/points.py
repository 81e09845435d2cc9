"""Tables of results, long or wide, read into points; a bad figure is named by its row."""

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from architectures import published_gmacs
from errors import ScalingError

# columns that describe a run; any other column of a wide table is a measurement
ABOUT = ("run", "model", "group", "data", "data_size", "samples_seen", "gmacs", "seed")
LONG = ("task", "dataset", "metric", "value", "n_eval")
_LOWER = re.compile(r"(?<![a-z])(err(or)?\d*|loss|nll|perplexity)(?![a-z])")
_UNBOUNDED = re.compile(r"(?<![a-z])(loss|nll|perplexity)(?![a-z])")
_HIGHER = re.compile(r"(?<![a-z])(acc|top-?\d|recall|r@|precision|m?ap(?![a-z])|auc|auroc|f1|hit)")


@dataclass(frozen=True)
class Point:
    """One measurement of one training run.

    Attributes:
        run: the run's name, or its model, data, samples and seed.
        gmacs: 1e9 multiply-accumulates of one forward pass of one pair.
        quantity: what was measured, TASK/DATASET/METRIC or the column of a wide table.
        error: 1 - accuracy, 1 - recall, or the loss itself; positive.
        kind: "error", a fraction up to 1, or "loss".
        n_eval: how many samples the error is a mean over, where the table says.
    """

    run: str
    model: str
    group: str
    data: str
    samples_seen: float
    gmacs: float
    quantity: str
    error: float
    kind: str = "error"
    n_eval: int | None = None

    @property
    def compute(self) -> float:
        """Compute of the training in GMAC: forward passes only, as the paper counts."""
        return self.gmacs * self.samples_seen


def read_points(
    path: Path | str, metrics: Sequence[str] = (), percent: bool = False
) -> list[Point]:
    """The measurements in a CSV file; `-` is standard input.

    A long table has the columns `value` and `metric`, one measurement a row; a wide one a column
    for each quantity. See the README for the columns.

    Args:
        metrics: keep only what one of these names: consecutive parts of TASK/DATASET/METRIC.
        percent: values are percentages.

    Raises:
        ScalingError: a column is missing or a row is bad, named by its row (the header is row 1).
    """
    try:
        if str(path) == "-":
            cast(io.TextIOWrapper, sys.stdin).reconfigure(encoding="utf-8-sig")
            return _read(sys.stdin, "standard input", metrics, percent)
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return _read(file, str(path), metrics, percent)
    except UnicodeDecodeError as error:
        raise ScalingError(f"{path}: not UTF-8 text, so no CSV file: {error.reason}") from error


def distinct(computes: Iterable[float]) -> int:
    """How many computes there are, those within a hundredth of a decade counted as one."""
    return len({round(math.log10(compute), 2) for compute in computes})


def matches(quantity: str, metrics: Sequence[str]) -> bool:
    """Whether one of `metrics` names this quantity; no metrics name everything."""
    return not metrics or any(f"/{metric}/" in f"/{quantity}/" for metric in metrics)


def _read(file: TextIO, name: str, metrics: Sequence[str], percent: bool) -> list[Point]:
    rows = csv.reader(file, strict=True)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        wide = _check_header(header, name)
        columns = [c for c in wide if matches(c, metrics)]
        points: list[Point] = []
        seen: dict[tuple[str, str], int] = {}
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{name}, row {rows.line_num}"
            if len(cells) != len(header):
                raise ScalingError(f"{where}: {len(cells)} cells, the header has {len(header)}")
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            measured = _wide(row, columns) if wide else _long(row, metrics, where)
            for quantity, metric, cell in measured:
                point = _point(row, where, quantity, metric, cell, percent)
                first = seen.setdefault((point.run, quantity), rows.line_num)
                if first != rows.line_num:
                    raise ScalingError(
                        f"{where}: repeats row {first}: {point.run}, {quantity}; keep one, or tell "
                        "the runs apart in the columns run or seed"
                    )
                points.append(point)
    except csv.Error as error:
        raise ScalingError(f"{name}, row {rows.line_num}: {error}") from error
    if not points:
        wanted = f" of {', '.join(metrics)}" if metrics else ""
        known = f"; columns: {', '.join(header)}" if metrics else ""
        raise ScalingError(f"{name}: no measurement{wanted}{known}")
    if percent and all(p.error > 0.99 for p in points if p.kind == "error"):
        raise ScalingError(f"{name}: no value above 1%, so these are fractions: omit --percent")
    return points


def _check_header(header: list[str], name: str) -> list[str]:
    """The measured columns of a wide table, none for a long one."""
    twice = sorted({c for c in header if header.count(c) > 1})
    if twice:
        raise ScalingError(f"{name}: column {twice[0]!r} appears twice")
    needed = {"model", "samples_seen"} | ({"metric"} if "value" in header else set())
    missing = sorted(needed - set(header))
    wide = [] if "value" in header else [c for c in header if c not in (*ABOUT, *LONG)]
    if "value" not in header and not wide:
        missing.append("value (or a column for each quantity)")
    if missing:
        raise ScalingError(
            f"{name}: column {', '.join(missing)} missing; found: {', '.join(header) or 'nothing'}"
        )
    return wide


def _wide(row: dict[str, str], columns: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(quantity, metric, cell) of every measurement; an empty cell was not measured."""
    return ((column, column, row[column]) for column in columns if row[column])


def _long(
    row: dict[str, str], metrics: Sequence[str], where: str
) -> Iterator[tuple[str, str, str]]:
    parts = [row.get("task", ""), row.get("dataset", ""), row["metric"]]
    quantity = "/".join(part for part in parts if part)
    if not matches(quantity, metrics):
        return
    if not _LOWER.search(row["metric"].lower()) and not _HIGHER.search(row["metric"].lower()):
        raise ScalingError(
            f"{where}: metric {row['metric']!r} does not say whether more is better; "
            "known: acc…, recall…, precision, auc, f1, …error, …loss"
        )
    yield quantity, row["metric"], row["value"]


def _point(
    row: dict[str, str], where: str, quantity: str, metric: str, cell: str, percent: bool
) -> Point:
    samples = _positive(row["samples_seen"], f"{where}: samples_seen")
    row["data"] = row.get("data") or row.get("data_size", "")
    gmacs = row.get("gmacs", "")
    known = None if gmacs else published_gmacs(row["model"])
    if not gmacs and known is None:
        raise ScalingError(
            f"{where}: no gmacs, and {row['model']!r} is none of the paper's models; "
            "`profile CONFIG` computes them"
        )
    about = [row.get(c, "") for c in ("model", "group", "data", "samples_seen", "seed")]
    n_eval = row.get("n_eval", "")
    kind = "loss" if _UNBOUNDED.search(metric.lower()) else "error"
    return Point(
        run=row.get("run", "") or " ".join(part for part in about if part),
        model=row["model"],
        group=row.get("group", "") or "all",
        data=row["data"],
        samples_seen=samples,
        gmacs=known if known is not None else _positive(gmacs, f"{where}: gmacs"),
        quantity=quantity,
        error=_error(cell, metric, f"{where}: {quantity}", kind, percent),
        kind=kind,
        n_eval=round(_positive(n_eval, f"{where}: n_eval")) if n_eval and kind != "loss" else None,
    )


def _number(cell: str, what: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        raise ScalingError(f"{what}: {cell!r} is not a number") from None
    if not math.isfinite(number):
        raise ScalingError(f"{what}: {cell!r} is not finite")
    if number < 0:
        raise ScalingError(f"{what}: {cell} is negative")
    return number


def _positive(cell: str, what: str) -> float:
    number = _number(cell, what)
    if number == 0:
        raise ScalingError(f"{what}: 0; it must be positive")
    return number


def _error(cell: str, metric: str, what: str, kind: str, percent: bool) -> float:
    value = _number(cell, what)
    if kind == "error":
        if value > (100 if percent else 1):
            fix = "no percentage" if percent else "no fraction; give --percent if it is a percent"
            raise ScalingError(f"{what}: {cell} is {fix}")
        # in percent the subtraction comes first: 100 - 77.97 keeps the figure's own decimals
        whole = 100.0 if percent else 1.0
        value = (value if _LOWER.search(metric.lower()) else whole - value) / whole
    if value <= 0:
        raise ScalingError(
            f"{what}: {cell} is an error of zero, which has no logarithm; "
            "leave the row out or evaluate on more samples"
        )
    return value
