"""Every benchmark runs and reports; its figures are for a quiet machine, not for a test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SMALL = {
    "build_memory": ["--rows", "50", "--rows", "100"],
    "build_shards": ["--images", "20", "--mode", "resize"],
    "finetune_curve": ["--images", "10", "--sets", "2", "--width", "64", "--workers", "0"],
    "finetune_step": ["--architecture", "XS", "--batch-size", "4", "--classes", "5"],
    "index_autofaiss": ["--rows", "3000", "--dim", "64", "--queries", "50", "--threads", "1"],
    # large enough to show in the memory of a process
    "loss": ["--rows", "3072", "--large-rows", "0", "--sigmoid-rows", "3072", "--width", "256"],
    "preprocess": ["--images", "4", "--repeat", "1", "--batch-size", "4"],
    "probe_grid": ["--rows", "200", "--width", "16", "--classes", "5", "--points", "2"],
    "train_loop": ["--architecture", "XS", "--batch-size", "4", "--steps", "1"],
    "train_overhead": ["--architecture", "XS", "--batch-size", "4", "--steps", "1"],
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
    others = {"interleaved", "open_clip_trainer", "serve_load", "train_accuracy", "train_setting"}
    assert {file.stem for file in BENCH.glob("*.py")} == {*SMALL, *others}


def report_of(script: str, *arguments: object) -> Any:
    command = [sys.executable, BENCH / script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_reports_a_ratio(name: str) -> None:
    """The script compares results before it times them, so that this is a check of these too."""
    found = ratios(report_of(f"{name}.py", *SMALL[name], "--rounds", 1))
    assert found
    assert all(ratio > 0 for ratio in found)


@pytest.mark.slow
def test_server_under_load() -> None:
    few = ["--architecture", "XS", "--pictures", 50, "--requests", 200, "--clients", 16]
    report = report_of("serve_load.py", *few)
    assert not report["quiet"]["wrong"]
    assert not report["abused"]["wrong"]
    assert report["refused"]


@pytest.mark.slow
def test_accuracy_of_both_trainers(tmp_path: Path) -> None:
    """Two classes in two colours, captions of two lines; each trainer takes two steps."""
    for number in range(16):
        label = ("red", "blue")[number % 2]
        for folder in (captioned := tmp_path / "captioned", tmp_path / "classes" / label):
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), label).save(folder / f"{number}.png")
        (captioned / f"{number}.txt").write_text(f"{label}\na {label} square")
    for words in ("captioned shards", "classes sets/colours --split test"):
        source, output, *options = words.split()
        command = [Path(sys.executable).with_name("clip-data"), "build"]
        subprocess.run([*command, tmp_path / source, tmp_path / output, *options], check=True)
    few = ["--samples", 16, "--batch-size", 8, "--warmup", 1]
    report = report_of("train_accuracy.py", tmp_path, tmp_path / "out", *few)
    for found in report["sides"].values():
        assert found["colours/test"] == found["mean"]
        assert 0 <= found["mean"][0] <= 1
