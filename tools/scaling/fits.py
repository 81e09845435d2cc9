"""Fits as JSON: what is said of a law, and predictions and comparisons made from the file."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from architectures import published_gmacs
from errors import ScalingError
from law import LEAST_RUNS, Law, interval, laws, least_squares, power
from points import Point, distinct, matches
from saturating import saturating
from settings import Settings

FAR = 0.5  # decades beyond the largest run from which a prediction is warned of
LAW, NO_LAW, UNKNOWN = "power law", "no power law here", "too few points to say"


def fit_points(points: Sequence[Point], settings: Settings) -> dict[str, Any]:
    """Fit a law to every quantity and group; what `fit` prints and the other commands read.

    Raises:
        ScalingError: fewer than three distinct computes in a group.
    """
    fitted = [describe(law) for law in laws(points, settings)]
    return rounded({"format": 1, "settings": asdict(settings), "fits": fitted})


def describe(law: Law) -> dict[str, Any]:
    """Everything that is said of one law; numbers that cannot be given are None."""
    x, y, chosen = law.chosen
    word, why = verdict(law)
    about: dict[str, Any] = {
        "quantity": law.quantity,
        "group": law.group,
        "verdict": word,
        "why": why,
        "prefactor": None if law.line is None else power(law.line[0]),
        "exponent": None if law.line is None else law.line[1],
        "interval_95": None,
        "rule": law.rule,
        "runs": len(law.points),
    }
    if law.replicates is not None:
        height, slope = law.replicates
        low, high = interval(height, len(law.points))
        about["interval_95"] = {
            "exponent": interval(slope, len(law.points)),
            "prefactor": [power(low), power(high)],
            "resamplings": len(slope),
        }
    elif law.settings.bootstrap:
        about["no_interval"] = (
            f"{len(law.points)} runs, of which {len(x)} points carry the law; "
            f"an interval needs {LEAST_RUNS} of both, in the resamplings too"
        )
    if law.line is not None:
        residual = y - law.line[0] - law.line[1] * x
        about["residual_decades"] = math.sqrt(float((residual**2).mean()))
        about["leave_one_out"] = leave_one_out(law)
        if law.settings.holdout_largest:
            about["holdout"] = hold_out(law, law.settings.holdout_largest)
    if law.settings.saturating:
        about["saturating"] = saturating(law)
    about["compute"] = [min(p.compute for p in law.points), max(p.compute for p in law.points)]
    about["points"] = [
        {"run": law.points[r].run, "compute": float(10**a), "error": float(10**b)}
        for r, a, b in zip(chosen, x, y, strict=True)
    ]
    about["data"] = [{k: v for k, v in asdict(p).items() if k != "quantity"} for p in law.points]
    return about


def verdict(law: Law) -> tuple[str, str]:
    """Whether there is a law, and why.

    The best runs fall with compute even where nothing depends on it, because a frontier only goes
    down. So the exponent of all runs must lie below zero too.
    """
    count = len(law.chosen[2])
    if len(law.points) < LEAST_RUNS:
        return UNKNOWN, f"{len(law.points)} runs allow no interval"
    if law.line is None:
        if count >= 3:
            return UNKNOWN, f"the {count} points are of nearly one compute"
        return NO_LAW, f"only {count} of {len(law.points)} runs gain from more compute"
    if law.line[1] >= 0:
        return NO_LAW, "the error does not fall with compute"
    every = law.resampled("all")
    if law.replicates is None or every is None:
        why = f"{count} points allow no interval" if law.settings.bootstrap else "no resampling"
        return UNKNOWN, why
    if interval(law.replicates[1], len(law.points))[1] >= 0:
        return NO_LAW, "the exponent's interval reaches zero"
    if interval(every[1], len(law.points))[1] >= 0:
        return NO_LAW, "the best runs fall with compute, as the best of noise do; all runs do not"
    return LAW, "the exponent's interval lies below zero, for these points and for all runs"


def leave_one_out(law: Law) -> dict[str, Any] | None:
    """The range of the exponent when one run is missing, and the run that moves it most."""
    runs = len(law.points)
    if runs < 4 or law.line is None:
        return None
    keep = np.array([[j for j in range(runs) if j != i] for i in range(runs)])
    slope = least_squares(*law.select(law.log_compute[keep], law.log_errors[keep]))[1]
    if np.isnan(slope).all():
        return None
    most = int(np.nanargmax(np.abs(slope - law.line[1])))
    return {
        "exponent": [float(np.nanmin(slope)), float(np.nanmax(slope))],
        "most": law.points[most].run,
    }


def hold_out(law: Law, largest: int) -> list[dict[str, Any]] | None:
    """The `largest` runs by compute, predicted from a fit of the others.

    None where fewer than three distinct computes, or points that carry a line, are left.
    """
    order = sorted(law.points, key=lambda p: p.compute)
    kept, held = order[:-largest], order[-largest:]
    inner = replace(law, points=tuple(kept))
    if distinct(p.compute for p in kept) < 3 or inner.line is None:
        return None
    return [{"run": p.run, "measured": p.error, **at(inner, p.compute)} for p in held]


def at(law: Law, compute: float) -> dict[str, Any]:
    """The law's error at this compute, its interval, and how far beyond the runs it lies."""
    x = math.log10(compute)
    beyond = max(0.0, x - float(law.log_compute.max()), float(law.log_compute.min()) - x)
    return {"error": power(law.at(x)), "interval_95": law.interval_at(x), "beyond": beyond}


def predict(
    fitted: Sequence[Law], compute: float, metrics: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What every law says of a run of this compute (GMACs of a pair times samples seen).

    Raises:
        ScalingError: no law of these quantities that has a line.
    """
    found = []
    for law in fitted:
        if not matches(law.quantity, metrics) or law.line is None:
            continue
        said = {"quantity": law.quantity, "group": law.group, **at(law, compute)}
        if said["beyond"] > FAR:
            said["warning"] = f"{said['beyond']:.2f} decades of compute beyond any run of the fit"
        found.append(said)
    if not found:
        known = ", ".join(sorted({law.quantity for law in fitted}))
        raise ScalingError(f"no law of {', '.join(metrics) or 'anything'}; the fit has {known}")
    return rounded(found)


def compare(fitted: Sequence[Law], metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The difference of exponents of every two groups, with its interval where both have one.

    Raises:
        ScalingError: no quantity has two groups with a line.
    """
    found = []
    for one, two in combinations([law for law in fitted if matches(law.quantity, metrics)], 2):
        if one.quantity != two.quantity or one.line is None or two.line is None:
            continue
        difference: dict[str, Any] = {
            "quantity": one.quantity,
            "groups": [one.group, two.group],
            "exponents": [one.line[1], two.line[1]],
            "difference": one.line[1] - two.line[1],
            "interval_95": None,
        }
        if one.replicates is not None and two.replicates is not None:
            size = min(len(one.replicates[1]), len(two.replicates[1]))
            apart = one.replicates[1][:size] - two.replicates[1][:size]  # drawn independently
            low, high = interval(apart, min(len(one.points), len(two.points)))
            difference |= {"interval_95": [low, high], "differ": not low <= 0 <= high}
        else:
            few = [law.group for law in (one, two) if law.replicates is None]
            difference |= {"differ": None, "why": f"no interval for {' and '.join(few)}"}
            for law, other in ((one, two), (two, one)):
                if law.replicates is not None and other.line is not None:
                    low, high = interval(law.replicates[1], len(law.points))
                    inside = low <= other.line[1] <= high
                    difference["inside"] = {"interval_of": law.group, "is": inside}
        found.append(difference)
    if not found:
        raise ScalingError("no quantity with laws of two groups; fit with --by and two groups")
    return rounded(found)


def read_fits(path: Path | str) -> list[Law]:
    """The laws of a file that `fit` wrote.

    Raises:
        ScalingError: another file.
    """
    try:
        return laws_of(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
    except UnicodeDecodeError as error:
        raise ScalingError(f"{path}: not text, so no fit; make one: fit --json") from error
    except json.JSONDecodeError as error:
        raise ScalingError(f"{path}: not JSON ({error}); make it anew: fit --json") from error


def laws_of(stored: dict[str, Any], name: str) -> list[Law]:
    """The laws of `fit_points`'s result, refitted from the runs and settings that it holds."""
    try:
        if stored["format"] != 1:
            raise KeyError("format")
        values = {f.name: stored["settings"][f.name] for f in fields(Settings)}
        settings = Settings(**(values | {"metric": tuple(values["metric"])}))
        return [
            Law(
                fit["quantity"],
                fit["group"],
                tuple(Point(quantity=fit["quantity"], **row) for row in fit["data"]),
                settings,
            )
            for fit in stored["fits"]
        ]
    except (KeyError, TypeError) as error:
        raise ScalingError(f"{name}: no fit ({error!r}); make one: fit --json") from error


def gmacs_of(fitted: Sequence[Law], model: str) -> float:
    """GMACs of a model's pair, as in the fit's runs, else as in the paper.

    Raises:
        ScalingError: known to neither.
    """
    known = {p.model: p.gmacs for law in fitted for p in law.points}
    gmacs = known.get(model, published_gmacs(model))
    if gmacs is None:
        raise ScalingError(
            f"{model!r} is no model of the fit ({', '.join(known)}) nor of the paper; give --gmacs"
        )
    return gmacs


def rounded(value: Any) -> Any:
    """Computed numbers at six significant digits: the rest depends on the machine.

    The runs under `data` stay as they are, because laws are refitted from them.
    """
    if isinstance(value, dict):
        return {k: v if k == "data" else rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.6g}")
    return value
