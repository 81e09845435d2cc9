"""Two results of a suite, or two models of one, paired image by image.

- Top-1 of one label an image: McNemar's exact test on the images that one model has right and the
  other wrong (McNemar, 1947; two-sided binomial).
- Mean per-class recall, and mean average precision of many labels: the 95% interval of the
  difference by a paired bootstrap, which draws the same images for both.
- Retrieval has no predictions to pair: differences only.

The p-values of all sets of a task are also adjusted for their number (Holm, 1979).
"""

# N images, C classes, T draws

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_probe.errors import ProbeError
from clip_probe.metrics import DRAWS, bootstrap_mean_average_precision, interval_of
from clip_probe.predictions import read_predictions
from clip_probe.results import read_results
from clip_probe.suite import FOLDERS, folder_of

Row = dict[str, Any]


def compare(
    a: Path, b: Path, model_a: str | None = None, model_b: str | None = None
) -> list[dict[str, Any]]:
    """One row for each set and task that both have: B minus A.

    Args:
        a, b: folders that `suite` wrote; they may be one.
        model_a, model_b: the models to compare; without them, those of equal name in both, or the
            only one of each.

    Raises:
        ProbeError: no results, no such model, nothing in common, the same set with other images or
            labels.
    """
    rows_a, rows_b = _results(a), _results(b)
    found: list[dict[str, Any]] = []
    for name_a, name_b in _pairs(rows_a, rows_b, model_a, model_b):
        mine = {(row["set"], row["task"]): row for row in rows_b if row["name"] == name_b}
        for row in rows_a:
            other = mine.get((row["set"], row["task"]))
            if row["name"] == name_a and other:
                head = {"task": row["task"], "set": row["set"], "a": name_a, "b": name_b}
                found += [{**head, **about} for about in _differences(a, row, b, other)]
    if not found:
        raise ProbeError(f"{a} and {b} have no set and task in common for these models")
    for task in dict.fromkeys(row["task"] for row in found):
        _adjust([row for row in found if row["task"] == task and row.get("p_value") is not None])
    return found


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of a split of discordant images."""
    from scipy.stats import binomtest

    trials = only_a + only_b
    return float(binomtest(only_a, trials).pvalue) if trials else 1.0


def _results(folder: Path) -> list[Row]:
    rows = read_results(folder / "results.jsonl")
    if not rows:
        raise ProbeError(f"{folder} holds no results.jsonl: make it with `clip-probe suite`")
    return rows


def _pairs(
    rows_a: list[Row], rows_b: list[Row], model_a: str | None, model_b: str | None
) -> list[tuple[str, str]]:
    names_a, names_b = (
        list(dict.fromkeys(row["name"] for row in rows)) for rows in (rows_a, rows_b)
    )
    for name, names in ((model_a, names_a), (model_b, names_b)):
        if name is not None and name not in names:
            raise ProbeError(f"no model {name!r} among the results: found {', '.join(names)}")
    if model_a or model_b:
        one, other = model_a or model_b or "", model_b or model_a or ""
        if one not in names_a or other not in names_b:
            raise ProbeError(f"{one!r} and {other!r}: give both --model-a and --model-b")
        return [(one, other)]
    if len(names_a) == len(names_b) == 1:
        return [(names_a[0], names_b[0])]
    both = [(name, name) for name in names_a if name in names_b]
    if not both:
        raise ProbeError(
            f"no model of one name in both ({', '.join(names_a)}; {', '.join(names_b)}): "
            "give --model-a and --model-b"
        )
    return both


def _differences(a: Path, row_a: Row, b: Path, row_b: Row) -> Iterator[dict[str, Any]]:
    """A row for each metric of one set and task."""
    if row_a["task"] == "retrieval":
        if row_a["images"] != row_b["images"] or row_a["captions"] != row_b["captions"]:
            raise ProbeError(f"{row_a['set']}: other images or captions in {b} than in {a}")
        for metric, value in row_a["metrics"].items():
            if metric in row_b["metrics"]:
                yield _values(metric, value, row_b["metrics"][metric])
        return
    if row_a["digest"] != row_b["digest"]:
        raise ProbeError(f"{row_a['set']}: other images, labels or class names in {b} than in {a}")
    scores_a, scores_b = (row.get("full", row) for row in (row_a, row_b))
    files = [_file(folder, row) for folder, row in ((a, row_a), (b, row_b))]
    one, other = (read_predictions(file) for file in files)
    if one["key"].tolist() != other["key"].tolist():
        raise ProbeError(f"{row_a['set']}: {a} and {b} could not read the same images")
    if "scores" in one:
        labels_NC = np.zeros((len(one["labels"]), row_a["classes"]), np.bool_)
        for n, labels in enumerate(one["labels"]):
            labels_NC[n, labels] = True
        draws_T = bootstrap_mean_average_precision(np.stack(other["scores"]), labels_NC)
        draws_T -= bootstrap_mean_average_precision(np.stack(one["scores"]), labels_NC)
        metric = "mean_average_precision"
        yield {**_values(metric, row_a[metric], row_b[metric]), "ci95": interval_of(draws_T)}
        return
    labels_N = one["label"]
    right_a, right_b = (np.stack(x["best"])[:, 0] == labels_N for x in (one, other))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    yield {
        **_values("acc1", scores_a["acc1"], scores_b["acc1"]),
        "ci95": interval_of(_bootstrap(right_b.astype(float) - right_a, np.zeros_like(labels_N))),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "test": "McNemar exact",
        "p_value": mcnemar(only_a, only_b),
    }
    metric = "mean_per_class_recall"
    right_a, right_b = one["predicted"] == labels_N, other["predicted"] == labels_N
    draws_T = _bootstrap(right_b.astype(float) - right_a, labels_N)
    yield {**_values(metric, scores_a[metric], scores_b[metric]), "ci95": interval_of(draws_T)}


def _values(metric: str, value_a: float, value_b: float) -> dict[str, Any]:
    return {
        "metric": metric,
        "value_a": value_a,
        "value_b": value_b,
        "difference": value_b - value_a,
    }


def _file(folder: Path, row: Row) -> Path:
    where = folder / FOLDERS[row["task"]] / folder_of(row["name"]) / folder_of(row["set"])
    return where / "predictions.parquet"


def _bootstrap(gain_N: NDArray[np.float64], strata_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draws [T] of the mean over strata of each one's mean gain, images drawn within strata."""
    rng = np.random.default_rng(0)
    means: list[NDArray[np.float64]] = []
    for stratum in np.unique(strata_N):
        gain_n = gain_N[strata_N == stratum]
        values, counts = np.unique(gain_n, return_counts=True)  # of -1, 0 and 1: counts say it all
        drawn = rng.multinomial(len(gain_n), counts / len(gain_n), DRAWS)
        means.append(drawn @ values / len(gain_n))
    return np.mean(means, axis=0)


def _adjust(rows: list[dict[str, Any]]) -> None:
    """Add Holm's adjusted p-values."""
    highest = 0.0
    for rank, row in enumerate(sorted(rows, key=lambda row: row["p_value"])):
        highest = max(highest, min(1.0, (len(rows) - rank) * row["p_value"]))
        row["p_value_holm"] = highest
