"""Several processes encode into one cache; the first says what one alone would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., list[dict[str, Any]]]
Digits = list[tuple[bytes, int]]
WriteSet = Callable[..., Path]


def launch(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Two processes on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "clip_probe", *map(str, arguments)]
    command += ["--workers", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.mark.slow
def test_two_processes_say_what_one_says(
    run: Run, model_dir: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    path = write_set(tmp_path / "set", {"test": rows[:1100]})
    cache = tmp_path / "cache"
    done = launch("zeroshot", model_dir, path, path, "--cache", cache)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == run("zeroshot", model_dir, path) * 2
    abouts = [json.loads(file.read_text()) for file in cache.glob("*/about.json")]
    assert len(abouts) == 1
    assert len(list(cache.glob("*/post/*.safetensors"))) == 3  # two of them by the first process


@pytest.mark.slow
def test_what_goes_wrong_in_another_process_is_said_once(
    model_dir: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    """The second block, which is the second process's, holds too many corrupt images."""
    bad = [(b"not an image", label) for _, label in rows[:60]]
    path = write_set(tmp_path / "set", {"test": [*rows[:600], *bad]}, shards=1)
    done = launch("zeroshot", model_dir, path, "--cache", tmp_path / "cache")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("images so far cannot be decoded, of 660 (limit 5%)") == 1
