"""The scripts of tools/scaling, importable, and runs made up for a test."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SCALING = Path(__file__).parents[2] / "tools" / "scaling"
sys.path.insert(0, str(SCALING))

from points import Point  # noqa: E402


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call the command in a process of its own."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, SCALING / "scaling.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    return call


@pytest.fixture(scope="session")
def published() -> Path:
    return SCALING / "published"


@pytest.fixture(scope="session")
def make_runs() -> Callable[..., tuple[Point, ...]]:
    """A run for each compute and error, and nothing else of note."""

    def make(
        compute: np.ndarray, error: np.ndarray, n_eval: int | None = None
    ) -> tuple[Point, ...]:
        return tuple(
            Point(f"run {i}", "m", "all", "d", float(c), 1.0, "q", float(e), "error", n_eval)
            for i, (c, e) in enumerate(zip(compute, error, strict=True))
        )

    return make
