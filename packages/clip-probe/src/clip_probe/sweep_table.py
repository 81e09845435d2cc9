"""A sweep's result as a table, and the names of its settings."""

from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Linear probes on {Path(result['dataset']).name}, {result['feature']} features, "
        f"{result['solver']} solver",
        "",
        f"Choice of the setting: {result['choice']}.",
        "",
        "| images per class | draws | test accuracy | spread or 95% | settings chosen |",
        "| --- | --- | --- | --- | --- |",
    ]
    if result["zero_shot"]:
        low, high = result["zero_shot"]["acc1_ci95"]
        lines.append(
            f"| zero-shot | - | {result['zero_shot']['acc1']:.2%} | {low:.2%} to {high:.2%} | - |"
        )
    for row in result["few_shot"]:
        spread = "-" if row["acc1_std"] is None else f"± {row['acc1_std']:.2%}"
        chosen = sorted({label(draw) for draw in row["draws"]})
        lines.append(
            f"| {row['shots']} | {len(row['draws'])} | {row['acc1_mean']:.2%} | {spread} "
            f"| {'; '.join(chosen)} |"
        )
    full, (low, high) = result["full"], result["full"]["acc1_ci95"]
    lines.append(f"| all | - | {full['acc1']:.2%} | {low:.2%} to {high:.2%} | {label(full)} |")
    return "\n".join(lines) + "\n"


def label(setting: dict[str, Any]) -> str:
    """A setting in a few letters."""
    if "c" in setting:
        return f"C {setting['c']:.3g}"
    decay = f", decay {setting['weight_decay']:g}" if setting["weight_decay"] else ""
    return f"lr {setting['lr']:g} x {setting['epochs']}{decay}"


def judged_rows(result: dict[str, Any]) -> dict[str, list[float]]:
    """The accuracy of each setting by number of shots, the mean over draws, where it was judged."""
    key = "test_acc1" if "test_acc1" in result["full"] else "val_acc1"
    found = {str(row["shots"]): [draw[key] for draw in row["draws"]] for row in result["few_shot"]}
    found["all"] = [result["full"][key]]
    return {
        shots: [sum(column) / len(column) for column in zip(*draws, strict=True)]
        for shots, draws in found.items()
        if draws[0] is not None
    }
