"""Robustness to shift: Taori's line, and the command over lines of other commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_probe import ProbeError
from clip_probe.robustness import logit, robustness, scores_of
from PIL import Image
from scipy.special import expit
from scipy.stats import linregress

Run = Callable[..., list[dict[str, Any]]]
Fail = Callable[..., str]

BASE = {"a": 0.5, "b": 0.6, "c": 0.75, "new": 0.7}
SHIFTED = {"a": 0.3, "b": 0.42, "c": 0.5, "new": 0.65}
SCORES = {model: {"base": BASE[model], "shift": SHIFTED[model]} for model in BASE}


def test_effective_robustness_is_what_the_line_does_not_explain() -> None:
    rows = {row["model"]: row for row in robustness(SCORES, "base", ["shift"], ["a", "b", "c"])}
    x, y = ([logit(scores[m]) for m in "abc"] for scores in (BASE, SHIFTED))
    line = linregress(x, y)
    usual = expit(line.slope * logit(0.7) + line.intercept)
    assert rows["new"]["effective_robustness"]["shift"] == pytest.approx(0.65 - usual)
    assert rows["new"]["drop"]["shift"] == pytest.approx(0.05)
    assert rows["new"]["shifted_mean"] == 0.65
    assert [rows[model]["baseline"] for model in ("a", "new")] == [True, False]
    (row, *_) = robustness(SCORES, "base", ["shift"])
    assert row["effective_robustness"] is None


def test_a_baseline_of_two_models_explains_both() -> None:
    rows = robustness(SCORES, "base", ["shift"], ["a", "b"])
    assert rows[0]["effective_robustness"]["shift"] == pytest.approx(0, abs=1e-12)
    assert rows[1]["effective_robustness"]["shift"] == pytest.approx(0, abs=1e-12)


def test_accuracies_without_a_logit() -> None:
    assert np.isfinite([logit(0.0), logit(1.0)]).all()
    scores = {"a": {"base": 1.0, "shift": 0.0}, "b": {"base": 0.5, "shift": 0.5}}
    assert len(robustness(scores, "base", ["shift"], ["a", "b"])) == 2


def test_what_cannot_be_said() -> None:
    with pytest.raises(ProbeError, match="no model has scores on 'base' and 'none'"):
        robustness(SCORES, "base", ["none"])
    with pytest.raises(ProbeError, match="baseline model 'd' has no score on base, shift"):
        robustness(SCORES, "base", ["shift"], ["a", "d"])
    with pytest.raises(ProbeError, match=r"two or more models of different accuracy .* found 1: a"):
        robustness(SCORES, "base", ["shift"], ["a"])
    rows = [{"task": "zeroshot", "model": "m", "dataset": "x/s", "acc1": 0.5}] * 2
    with pytest.raises(ProbeError, match="two scores of 'm' on 's'"):
        scores_of(rows)


def test_command(run: Run, fail: Fail, model_dir: Path, digits: Path, tmp_path: Path) -> None:
    """Lines of zeroshot and of eval, of two models and a head, in two files."""
    (line,) = run("zeroshot", model_dir, digits)
    shifted = {**line, "dataset": "sets/shifted", "acc1": line["acc1"] / 2}
    head = [{**row, "task": "eval", "head": "probe", "acc1": 0.5} for row in (line, shifted)]
    probe = {"task": "probe", "full": {"acc1": 0.9}}  # of a suite, and no score here
    for name, rows in (("one", [line, shifted, probe]), ("two", head)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (tmp_path / "one", tmp_path / "two")
    plot = tmp_path / "plot.png"
    one, two = run("robustness", *files, "--base", "digits", "--plot", plot)
    assert one["model"] == str(model_dir)
    assert two["model"] == f"{model_dir} probe"
    assert one["drop"] == {"shifted": line["acc1"] / 2}
    assert Image.open(plot).format == "PNG"
    baseline = ("--baseline", one["model"], "--baseline", two["model"])
    (again, _) = run("robustness", *files, "--base", "digits", *baseline, "--plot", plot)
    assert again["effective_robustness"]["shifted"] == pytest.approx(0, abs=1e-12)
    (tmp_path / "base").write_text(json.dumps(line))
    assert "no shifted set" in fail("robustness", tmp_path / "base", "--base", "digits")
    assert "'cars'" in fail("robustness", *files, "--base", "cars")
    assert "no results at" in fail("robustness", tmp_path / "none", "--base", "digits")
    (tmp_path / "latin").write_bytes(b'{"task": "\xe9"}')
    assert "is not JSON Lines" in fail("robustness", tmp_path / "latin", "--base", "digits")
