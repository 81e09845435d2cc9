"""The first table of a suite's report: a line for each model, as in the paper."""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_probe.averages import IMAGENET, PROBE_AVERAGES, ZEROSHOT_AVERAGES
from clip_probe.suite_config import SuiteConfig
from clip_probe.tables import Report, best_of, percent

Row = Mapping[str, Any]
RECALLS = ("image_retrieval_recall@", "text_retrieval_recall@")
ARROWS = {
    "image_retrieval_recall@": "text to image R@",
    "text_retrieval_recall@": "image to text R@",
}
NAMED = 8  # sets that a mean lacks, beyond which their number must do


def add_summary(
    report: Report,
    config: SuiteConfig,
    rows: Sequence[Row],
    zeroshot: Mapping[str, Mapping[str, float]],
    averages: Mapping[str, Mapping[str, float | None]],
    probe_averages: Mapping[str, Mapping[str, float | None]],
    shifts: Sequence[Row],
) -> None:
    """Add the table; columns without any figure are left out."""
    report.heading("Summary")
    models, robust = list(config.models), config.robustness
    first = {model: next(row for row in rows if row["name"] == model) for model in models}
    base = robust.base if robust else IMAGENET
    columns: list[tuple[str, list[str], list[float | None]]] = []
    for title, key, scale in (
        ("parameters, M", "parameters", 1e6),
        ("GMACs a pair", "gmacs", 1),
        ("samples seen", "samples_seen", 1),
    ):
        values = [first[model].get(key) for model in models]
        digits = 0 if key == "samples_seen" else 2
        texts = ["–" if v is None else f"{v / scale:,.{digits}f}" for v in values]
        columns.append((title, texts, [None] * len(models)))

    def add(title: str, values: Sequence[float | None]) -> None:
        columns.append((title, [percent(value) for value in values], list(values)))

    add(f"{base}, top-1", [zeroshot.get(model, {}).get(base) for model in models])
    if robust:
        mean = {row["model"]: row["shifted_mean"] for row in shifts}
        add(f"mean of {len(robust.shifted)} shifts", [mean.get(model) for model in models])
    for name, by_model in averages.items():
        add(f"{name}, zero-shot", [by_model[model] for model in models])
    for name, by_model in probe_averages.items():
        add(f"{name}, probe", [by_model[model] for model in models])
    found = {
        (row["name"], row["set"]): row["metrics"] for row in rows if row["task"] == "retrieval"
    }
    for name in dict.fromkeys(dataset for _, dataset in found):
        for kind in RECALLS:
            recalls = [found.get((model, name), {}).get(f"{kind}5") for model in models]
            add(f"{name}, {ARROWS[kind]}5", recalls)
    columns = [c for c in columns if any(text != "–" for text in c[1])]
    cells = [best_of(values, texts) for _, texts, values in columns]
    lines = [[model, *(column[n] for column in cells)] for n, model in enumerate(models)]
    report.table(["model", *(title for title, _, _ in columns)], lines)
    lacking = _lacking(
        config, ZEROSHOT_AVERAGES, "zero-shot", {r["set"] for r in rows if "acc1" in r}
    )
    probed = {row["set"] for row in rows if row["task"] == "probe"}
    lacking += _lacking(config, PROBE_AVERAGES, "probe", probed) if probed else []
    report.paragraph(
        "Scores are in percent; the best of a kind is bold."
        + (f" Not all of their sets are here: {'; '.join(lacking)}." if lacking else "")
    )


def _lacking(
    config: SuiteConfig, papers: Mapping[str, Sequence[str]], kind: str, here: set[str]
) -> list[str]:
    """Which sets the means lack."""
    found: list[str] = []
    for name, sets in {**papers, **config.averages}.items():
        if lacks := [one for one in sets if one not in here]:
            named = f" ({', '.join(lacks)})" if len(lacks) <= NAMED else ""
            found.append(f"{name}, {kind}, lacks {len(lacks)} of {len(sets)}{named}")
    return found
