"""The report of a study: report.md, report.html with its plots inside, and summary.json."""

import base64
import csv
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plots import short
from study_cells import quantity
from study_run import times, write_whole

PLOTS = {
    "zero-shot": "Zero-shot classification, in the style trained on and in a style never seen",
    "retrieval": "Retrieval, text to image and image to text",
    "tuning": "Linear probes on frozen features, and fine-tuning",
}
Block = tuple[Any, ...]
"""("h", level, text), ("p", text), ("table", header, rows) or ("figure", file, caption)."""


def families(grid: dict[str, Any], fitted: set[str]) -> dict[str, list[str]]:
    """The tasks in each plot, of those that were fitted."""
    shots = [f"{n}-shot" for n in grid.get("probe", {}).get("shots", [])]
    tasks = {
        "zero-shot": ["zero-shot", "robustness"],
        "retrieval": ["retrieval"],
        "tuning": [*shots, "full-probe", "fine-tune"],
    }
    found = {name: [task for task in every if task in fitted] for name, every in tasks.items()}
    return {name: chosen for name, chosen in found.items() if chosen}


def write_report(study: dict[str, Any], out: Path) -> None:
    """From points.csv, fit.json, frontier.jsonl and the plots, all in `out`."""
    fits = json.loads((out / "fit.json").read_text())["fits"]
    with (out / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = {"runs": len(study["cells"]), "scale": study["scale"]}
    told |= {"laws": [_law(fit) for fit in fits], "bottleneck": bottleneck(rows)}
    blocks = list(_blocks(study, rows, fits, told["bottleneck"], out))
    write_whole(out / "report.md", "\n\n".join(map(_markdown, blocks)) + "\n")
    page = "\n".join(_html(block, out) for block in blocks)
    write_whole(out / "report.html", f"{_HEAD}{page}\n</main>\n</html>\n")
    write_whole(out / "summary.json", json.dumps(told) + "\n")


def bottleneck(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """For each quantity and model: its values at the longest budget, by pairs trained on.

    `bound` says whether the fewest pairs are worst of all: more samples of the same data no longer
    help, more data does.
    """
    names = list(dict.fromkeys(map(quantity, rows)))
    found: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for row in rows:
        values = found.setdefault((quantity(row), row["model"]), {})
        pairs, samples = int(row["data_size"]), int(row["samples_seen"])
        if pairs not in values or values[pairs][0] < samples:
            values[pairs] = (samples, float(row["value"]))
    return [
        {
            "quantity": name,
            "model": model,
            "samples_seen": max(samples for samples, _ in values.values()),
            "values": {str(pairs): values[pairs][1] for pairs in sorted(values)},
            "bound": all(
                values[min(values)][1] < value
                for pairs, (_, value) in values.items()
                if pairs != min(values)
            ),
        }
        for (name, model), values in sorted(found.items(), key=lambda item: names.index(item[0][0]))
        if len(values) > 1
    ]


def _law(fit: dict[str, Any]) -> dict[str, Any]:
    interval = fit["interval_95"]
    return {
        "quantity": fit["quantity"],
        "verdict": fit["verdict"],
        "prefactor": fit["prefactor"],
        "exponent": fit["exponent"],
        "exponent_95": interval and interval["exponent"],
        "points": len(fit["points"]),
        "runs": fit["runs"],
    }


def _blocks(
    study: dict[str, Any],
    rows: list[dict[str, str]],
    fits: list[dict[str, Any]],
    bound: list[dict[str, Any]],
    out: Path,
) -> Iterator[Block]:
    cells = study["cells"]
    yield "h", 1, f"Scaling study: {study['grid']['name']}"
    models = {cell["model"]: cell["gmacs"] for cell in cells}
    computes = [float(row["gmacs"]) * float(row["samples_seen"]) for row in rows]
    budgets = sorted({int(row["samples_seen"]) for row in rows})
    yield (
        "p",
        f"{len(cells)} runs, each a full schedule of its own: {len(models)} models on "
        f"{len({cell['data'] for cell in cells})} sets of data, "
        f"{', '.join(map(short, budgets))} samples seen"
        + (f" ({study['scale']:g} of the grid's, to hold the time)" if study["scale"] != 1 else "")
        + f"; compute from {min(computes):.3g} to {max(computes):.3g} GMAC. Error is 1 - accuracy "
        "or 1 - recall. Laws E = a C^b are fitted to the runs that no cheaper run equals; the "
        "interval resamples the runs and chooses them anew.",
    )
    yield "p", _cost(study, out)
    yield "h", 2, "Laws"
    yield (
        "table",
        ["quantity", "law", "95% interval of b", "points", "verdict"],
        [
            [
                fit["quantity"],
                "none"
                if fit["exponent"] is None
                else f"{fit['prefactor']:.3g} C^{fit['exponent']:.3f}",
                _interval(fit),
                f"{len(fit['points'])} of {fit['runs']} runs",
                fit["verdict"]
                if fit["verdict"] == "power law"
                else f"{fit['verdict']}: {fit['why']}",
            ]
            for fit in fits
        ],
    )
    left_out = len(rows) - sum(fit["runs"] for fit in fits)
    if left_out:
        yield (
            "p",
            f"{left_out} measurements carry no law: errors of zero, and quantities of fewer than "
            "three computes.",
        )
    for name in families(study["grid"], {fit["quantity"].split("/")[0] for fit in fits}):
        yield "figure", f"plots/{name}.png", PLOTS[name]
    held = [
        (fit["quantity"], min(fit["holdout"], key=lambda row: row["measured"]))
        for fit in fits
        if fit.get("holdout")
    ]
    if held:
        yield "h", 2, "The best run of the largest compute, foretold from all smaller ones"
        yield (
            "table",
            ["quantity", "run", "error measured", "error foretold"],
            [
                [name, row["run"], _percent(row["measured"]), _percent(row["error"])]
                for name, row in held
            ],
        )
    if bound:
        yield "h", 2, "Data as the bottleneck"
        met = sum(row["bound"] for row in bound)
        yield (
            "p",
            f"At the longest budget, by pairs trained on. In {met} of {len(bound)} rows the fewest "
            "pairs are worst.",
        )
        sizes = sorted({size for row in bound for size in row["values"]}, key=int)
        yield (
            "table",
            ["quantity", "model", *(f"{int(n):,} pairs" for n in sizes), "fewest worst"],
            [
                [row["quantity"], row["model"]]
                + [_percent(row["values"][n]) if n in row["values"] else "" for n in sizes]
                + ["yes" if row["bound"] else "no"]
                for row in bound
            ],
        )
    yield "h", 2, "What holds runs back"
    yield (
        "p",
        (
            "Runs off the frontier, by what would have done better: other data at the same model "
            "and length; a smaller model that sees more, or a larger one that sees less, for no "
            "more compute. A run may count more than once."
        ),
    )
    lines = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    yield (
        "table",
        ["quantity", "on the frontier", "data", "samples", "model"],
        [
            [line["quantity"], ", ".join(point["run"] for point in line["frontier"])]
            + [str(line["limits"][kind]) for kind in ("data", "samples", "model")]
            for line in lines
        ],
    )
    yield "h", 2, "Every run"
    names = list(dict.fromkeys(map(quantity, rows)))
    values = {(row["run"], quantity(row)): float(row["value"]) for row in rows}
    yield (
        "table",
        ["run", "GMACs a pair", "epochs", *names],
        [
            [cell["name"], f"{cell['gmacs']:.4g}", f"{cell['samples_seen'] / cell['pairs']:.3g}"]
            + [_percent(values[cell["name"], name]) for name in names]
            for cell in cells
        ],
    )


def _cost(study: dict[str, Any], out: Path) -> str:
    """Minutes of the commands of the cells, all of them and training alone."""
    took = [times(out / "cells" / cell["name"]) for cell in study["cells"]]
    total = sum(sum(steps.values()) for steps in took) / 60
    train = sum(steps.get("train.json", 0) for steps in took) / 60
    return (
        f"The runs' commands took {total:.1f} minutes if they had run one after another, "
        f"{train:.1f} of them to train."
    )


def _interval(fit: dict[str, Any]) -> str:
    if fit["interval_95"] is None:
        return "none"
    low, high = fit["interval_95"]["exponent"]
    return f"{low:.3f} to {high:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _markdown(block: Block) -> str:
    match block:
        case ("h", level, text):
            return f"{'#' * level} {text}"
        case ("p", text):
            return text
        case ("figure", file, caption):
            return f"![{caption}]({file})\n\n*{caption}*"
        case ("table", header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    raise ValueError(block[0])


def _html(block: Block, out: Path) -> str:
    match block:
        case ("h", level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case ("p", text):
            return f"<p>{_raised(text)}</p>"
        case ("figure", file, caption):
            data = base64.b64encode((out / file).read_bytes()).decode()
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        case ("table", header, rows):
            head = "".join(f"<th>{html.escape(cell)}" for cell in header)
            body = "".join(
                f"<tr>{''.join(f'<td>{_raised(cell)}' for cell in row)}</tr>\n" for row in rows
            )
            return f"<div class=wide><table><tr>{head}</tr>\n{body}</table></div>"
    raise ValueError(block[0])


def _raised(text: str) -> str:
    return re.sub(r"\^(-?[\w.]+)", r"<sup>\1</sup>", html.escape(text))


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scaling study</title>
<style>
  body { margin: 0; background: #fafafa; color: #222; font: 15px/1.45 system-ui, sans-serif; }
  main { max-width: 1120px; margin: 0 auto; padding: 16px; }
  h1 { font-size: 26px; } h2 { margin-top: 36px; font-size: 20px; }
  figure { margin: 24px 0; } figure img { width: 100%; background: #fff; }
  figcaption { color: #666; font-size: 13px; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; background: #fff; font-size: 13px; }
  th, td { padding: 3px 12px 3px 8px; border-bottom: 1px solid #eee; text-align: left;
           font-variant-numeric: tabular-nums; vertical-align: top; }
  th { font-weight: 600; color: #666; } td:nth-child(-n + 4) { white-space: nowrap; }
</style>
<main>
"""
