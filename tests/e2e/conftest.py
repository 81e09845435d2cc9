"""The quickstart, run once for all tests: short, and killed twice on its way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """The installed commands first on the path; no network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "QUICKSTART_SHORT": "1", "HF_HUB_OFFLINE": "1"}


def quickstart(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ROOT / "tools" / "quickstart.sh", str(out)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """SIGKILL to everything that the script started, as soon as `ready`."""
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output directory and what the last run printed."""
    out = tmp_path_factory.mktemp("e2e") / "quickstart"
    kill_when(quickstart(out), lambda: (out / "shards" / "00001.tar").exists())
    kill_when(quickstart(out), lambda: (out / "run" / "metrics.jsonl").exists())
    process = quickstart(out)
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stderr
    return out, stdout
