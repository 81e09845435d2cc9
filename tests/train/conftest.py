"""A 70-pair training set in four shards of unequal size, and the command in a subprocess."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SIZES = (20, 25, 5, 20)
WORDS = ["red", "green", "blue", "dog", "cat", "tree", "house", "moon", "sun", "boat"]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((72, 80)).save(out, "JPEG")
    return out.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def pair(i: int) -> dict[str, bytes]:
    caption = f"a {WORDS[i % 10]} {WORDS[i // 10]} number {i}"
    return {"jpg": jpeg(i), "txt": caption.encode(), "json": b"{}"}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for shard, size in enumerate(SIZES):
        samples = {f"{shard:05}{row:04}": pair(first + row) for row in range(size)}
        write_shard(folder / f"{shard:05}.tar", samples)
        first += size
    return folder


def arguments(data: Path, output: Path, **changed: object) -> list[str]:
    """The options of a small run of 20 steps."""
    values: dict[str, object] = {
        "model": "XS",
        "train_data": data,
        "output": output,
        "samples_seen": 320,
        "batch_size": 16,
        "warmup": 2,
        "lr": 1e-3,
        "workers": 0,
        "log_every": 1,
        "grad_clip": 1.0,
    }
    return [
        part
        for name, value in (values | changed).items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]


def environment() -> dict[str, str]:
    """One thread and no accelerator: the same arithmetic in every process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(command: list[str], **changed: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | changed,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: list[str], **changed: str) -> subprocess.CompletedProcess[str]:
    process = start(command, **changed)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        kill_all(process.pid)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    direct = [int(child) for task in tasks for child in task.read_text().split()]
    return direct + [below for child in direct for below in children(child)]


def kill_all(pid: int) -> None:
    for victim in [pid, *children(pid)]:
        os.kill(victim, signal.SIGKILL)


def torchrun(processes: int) -> list[str]:
    return ["torchrun", "--standalone", "--nproc-per-node", str(processes), "clip-train"]
