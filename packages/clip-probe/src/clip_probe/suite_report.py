"""The report of a suite, in the shape of the paper's tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_probe.averages import PROBE_AVERAGES, ZEROSHOT_AVERAGES, average
from clip_probe.files import write_file, write_text
from clip_probe.robustness import plot_robustness, robustness
from clip_probe.suite_config import SuiteConfig
from clip_probe.suite_plots import plot_few_shot, plot_zeroshot
from clip_probe.suite_summary import ARROWS, RECALLS, add_summary
from clip_probe.tables import Cell, Report, best_of, percent

Row = Mapping[str, Any]


def write_report(config: SuiteConfig, rows: Sequence[Row], output: Path) -> dict[str, Any]:
    """Write report.md and report.html, and the pictures in them; returns files and averages."""
    report = Report(f"{len(config.models)} models on {len(config.sets)} sets")
    by_task = {
        task: [row for row in rows if row["task"] == task]
        for task in ("zeroshot", "probe", "retrieval")
    }
    single = [row for row in by_task["zeroshot"] if "acc1" in row]
    models = list(config.models)
    zeroshot = _scores(single, [row["acc1"] for row in single])
    probes = _scores(by_task["probe"], [row["full"]["acc1"] for row in by_task["probe"]])
    averages = _averages(config, zeroshot, ZEROSHOT_AVERAGES)
    probe_averages = _averages(config, probes, PROBE_AVERAGES)
    robust = config.robustness
    shifts = []
    if robust:
        shifts = robustness(zeroshot, robust.base, robust.shifted, robust.baseline)
    add_summary(report, config, rows, zeroshot, averages, probe_averages, shifts)
    _zeroshot(report, models, by_task["zeroshot"], averages, output)
    if robust:
        _robustness(report, zeroshot, shifts, robust.base, robust.shifted, robust.baseline, output)
    if by_task["retrieval"]:
        _retrieval(report, models, by_task["retrieval"])
    if by_task["probe"]:
        _probes(report, models, by_task["probe"], single, probe_averages, output)
    _conditions(report, rows)
    write_text(output / "report.md", report.to_markdown())
    write_text(output / "report.html", report.to_html())
    means = {
        name: {model: value for model, value in by_model.items() if value is not None}
        for name, by_model in averages.items()
    }
    found = {name: by_model for name, by_model in means.items() if by_model}
    return {"report": str(output / "report.html"), "averages": found, "robustness": shifts}


def _scores(rows: Sequence[Row], values: Sequence[float]) -> dict[str, dict[str, float]]:
    """By model, then by set."""
    scores: dict[str, dict[str, float]] = {}
    for row, value in zip(rows, values, strict=True):
        scores.setdefault(row["name"], {})[row["set"]] = value
    return scores


def _averages(
    config: SuiteConfig,
    scores: Mapping[str, Mapping[str, float]],
    papers: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, float | None]]:
    """By name of the mean, then by model."""
    return {
        name: {model: average(scores.get(model, {}), sets) for model in config.models}
        for name, sets in {**papers, **config.averages}.items()
    }


def _zeroshot(
    report: Report,
    models: Sequence[str],
    rows: Sequence[Row],
    averages: Mapping[str, Mapping[str, float | None]],
    output: Path,
) -> None:
    single = [row for row in rows if "acc1" in row]
    if single:
        report.heading("Zero-shot classification, top-1")
        extra = {f"mean: {name}": v for name, v in averages.items() if any(v.values())}
        _by_set(report, models, single, "acc1", extra)
        picture = output / "zeroshot.png"
        write_file(picture, lambda to: plot_zeroshot(models, single, to))
        report.picture(
            picture, "Zero-shot top-1 with 95% intervals; the bar is the commonest class."
        )
        for title, key in (
            ("Zero-shot classification, top-5", "acc5"),
            ("Zero-shot classification, mean per-class recall", "mean_per_class_recall"),
        ):
            report.heading(title)
            _by_set(report, models, single, key, {})
        report.heading("Calibration: expected calibration error of zero-shot confidences")
        _by_set(report, models, single, "ece", {}, sign=-1)
    if len(single) < len(rows):
        report.heading("Zero-shot classification with many labels, mean average precision")
        many = [row for row in rows if "acc1" not in row]
        _by_set(report, models, many, "mean_average_precision", {})


def _by_set(
    report: Report,
    models: Sequence[str],
    rows: Sequence[Row],
    key: str,
    extra: Mapping[str, Mapping[str, float | None]],
    sign: int = 1,
) -> None:
    """Sets down, models across."""
    found = {(row["name"], row["set"]): row for row in rows}
    lines: list[list[Cell | str]] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        some = [found[model, name] for model in models if (model, name) in found]
        values = [row[key] for row in some]
        texts = [_with_interval(row, key) for row in some]
        ranked = [None if v is None else sign * v for v in values]
        lines.append([name, f"{some[0]['samples']:,}", *best_of(ranked, texts)])
    for title, by_model in extra.items():
        values = [by_model[model] for model in models]
        lines.append([title, "", *best_of(values, [percent(v) for v in values])])
    report.table(["set", "images", *models], lines)


def _with_interval(row: Row, key: str) -> str:
    interval = row.get(f"{key}_ci95")
    if row[key] is None or interval is None:
        return percent(row[key])
    return f"{percent(row[key])} ({percent(interval[0])}–{percent(interval[1])})"


def _robustness(
    report: Report,
    scores: Mapping[str, Mapping[str, float]],
    shifts: Sequence[Row],
    base: str,
    shifted: Sequence[str],
    baseline: Sequence[str],
    output: Path,
) -> None:
    report.heading("Robustness to distribution shift")
    effective = bool(baseline)
    header = ["model", base, *shifted, "mean of shifts"]
    header += [f"effective, {name}" for name in shifted] if effective else []
    lines: list[list[Cell | str]] = []
    for row in shifts:
        line = [row["model"], percent(row["base"]), *(percent(row["shifted"][s]) for s in shifted)]
        line.append(percent(row["shifted_mean"]))
        if effective:
            line += [f"{100 * row['effective_robustness'][name]:+.1f}" for name in shifted]
        lines.append([*line])
    report.table(header, lines)
    if effective:
        report.paragraph(
            "Effective robustness (Taori et al., 2020): points above what a model of that accuracy "
            f"on {base} would have by the line through the baseline: {', '.join(baseline)}."
        )
    picture = output / "robustness.png"
    write_file(picture, lambda to: plot_robustness(scores, base, shifted, baseline, to))
    report.picture(picture, f"Top-1 on each shifted set against top-1 on {base}, logit axes.")


def _retrieval(report: Report, models: Sequence[str], rows: Sequence[Row]) -> None:
    report.heading("Zero-shot retrieval")
    for name in dict.fromkeys(row["set"] for row in rows):
        here = {row["name"]: row for row in rows if row["set"] == name}
        some = next(iter(here.values()))
        report.paragraph(f"{name}: {some['images']:,} images, {some['captions']:,} captions.")
        metrics = [m for kind in RECALLS for m in some["metrics"] if m.startswith(kind)]
        titles = [
            ARROWS[kind] + m.removeprefix(kind)
            for kind in RECALLS
            for m in metrics
            if m.startswith(kind)
        ]
        columns = [
            [here[m]["metrics"].get(metric) if m in here else None for m in models]
            for metric in metrics
        ]
        cells = [best_of(values, [percent(v) for v in values]) for values in columns]
        lines = [[model, *(column[n] for column in cells)] for n, model in enumerate(models)]
        report.table(["model", *titles], lines)


def _probes(
    report: Report,
    models: Sequence[str],
    rows: Sequence[Row],
    zeroshot: Sequence[Row],
    averages: Mapping[str, Mapping[str, float | None]],
    output: Path,
) -> None:
    report.heading("Linear probes on frozen features, top-1")
    direct = {(row["name"], row["set"]): row["acc1"] for row in zeroshot}
    for name in dict.fromkeys(row["set"] for row in rows):
        here = {row["name"]: row for row in rows if row["set"] == name}
        shots = list(dict.fromkeys(s["shots"] for row in here.values() for s in row["few_shot"]))
        lines: list[list[Cell | str]] = []
        for model, row in here.items():
            few = {s["shots"]: _mean_and_std(s) for s in row["few_shot"]}
            figures = [percent(direct.get((model, name))), *(few.get(k, "–") for k in shots)]
            lines.append([model, *figures, _with_interval(row["full"], "acc1")])
        report.paragraph(f"{name}: {next(iter(here.values()))['feature']} features.")
        report.table(["model", "zero-shot", *(f"{k}-shot" for k in shots), "full"], lines)
    for title, by_model in averages.items():
        if any(by_model.values()):
            report.table(["model", f"{title}, full"], [[m, percent(by_model[m])] for m in models])
    picture = output / "few_shot.png"
    write_file(picture, lambda to: plot_few_shot(models, rows, direct, to))
    report.picture(
        picture, "Probes against images a class: mean and std of the draws; dashed: zero-shot."
    )


def _mean_and_std(few: Row) -> str:
    spread = "" if few["acc1_std"] is None else f" ± {percent(few['acc1_std'])}"
    return percent(few["acc1_mean"]) + spread


def _conditions(report: Report, rows: Sequence[Row]) -> None:
    report.heading("What was measured")
    report.paragraph(
        "Every setting stands in results.jsonl; scores hold for these weights and images."
    )
    weights = {row["name"]: row for row in rows if row["task"] == "zeroshot"}
    report.table(
        ["model", "directory", "fingerprint"],
        [[name, row["model"], row["fingerprint"][:19] + "…"] for name, row in weights.items()],
    )
    sets = {row["set"]: row for row in rows if row["task"] == "zeroshot"}
    header = [
        "set",
        "split",
        "images",
        "unreadable",
        "classes",
        "images' hash",
        "prompts' hash",
        "precision",
    ]
    report.table(
        header,
        [
            [
                name,
                row["split"],
                f"{row['samples']:,}",
                str(row["failed"]),
                f"{row['classes']:,}",
                row["digest"],
                row["templates_hash"],
                row["precision"],
            ]
            for name, row in sets.items()
        ],
    )
