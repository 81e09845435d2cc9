"""Every benchmark runs and reports; its figures are for a quiet machine, not for a test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SMALL = {
    "build_memory": ["--rows", "50", "--rows", "100"],
    "build_shards": ["--images", "20", "--mode", "resize"],
    # large enough to show in the memory of a process
    "loss": ["--rows", "3072", "--large-rows", "0", "--sigmoid-rows", "3072", "--width", "256"],
    "preprocess": ["--images", "4", "--repeat", "1", "--batch-size", "4"],
    "train_step": ["--architecture", "XS", "--batch-size", "4", "--steps", "1"],
    "zero_shot_head": ["--architecture", "XS", "--classes", "2"],
}


def ratios(report: Any) -> list[float]:
    """Every ratio of speed in a report, however deep."""
    if not isinstance(report, dict):
        return []
    own = [report["ratio"]["median"]] if isinstance(report.get("ratio"), dict) else []
    return own + [found for value in report.values() for found in ratios(value)]


def test_every_benchmark_is_here() -> None:
    assert {file.stem for file in BENCH.glob("*.py")} == {*SMALL, "interleaved"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_reports_a_ratio(name: str) -> None:
    """The script compares results before it times them, so that this is a check of these too."""
    command = [sys.executable, BENCH / f"{name}.py", *SMALL[name], "--rounds", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    found = ratios(report)
    assert found
    assert all(ratio > 0 for ratio in found)
