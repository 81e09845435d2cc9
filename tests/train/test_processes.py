"""The command in real processes: started every way it must start, interrupted, and in twos."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clip_models import architecture
from clip_train import metrics
from clip_train.state import newest_state
from safetensors.torch import load_file

from .conftest import ROOT, arguments, children, kill_all, run, start, torchrun, write_shard

ALONE = ["clip-train"]


def weights(run: Path, model: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / model / "open_clip_model.safetensors")


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """Return when `step` is in the metrics."""
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in metrics.read_rows(output)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_help_is_quick_and_complete() -> None:
    code = (
        "import sys; from clip_train.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'accelerate', 'matplotlib'} & sys.modules.keys()"
    )
    found = run([sys.executable, "-c", code])
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Usage: ")
    for option in ("--samples-seen INTEGER", "--batch-size INTEGER", "[auto|bf16|fp16|fp32]"):
        assert option in found.stdout


def test_usage_and_expected_errors(data: Path, tmp_path: Path) -> None:
    usage = run([*ALONE, *arguments(data, tmp_path / "run", beta1=2)])
    assert usage.returncode == 2
    assert "--beta1 is 2.0; it must be at least 0 and below 1" in usage.stderr
    write_shard(tmp_path / "0.tar", {"a": {"png": b"x"}})
    failure = run([*ALONE, *arguments(tmp_path, tmp_path / "run")])
    assert failure.returncode == 1
    assert failure.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}/0.tar: no image-caption")
    assert not (tmp_path / "run").exists()
    assert not usage.stdout + failure.stdout


@pytest.mark.slow
def test_accelerate_launch_from_the_root(data: Path, tmp_path: Path) -> None:
    launch = ["accelerate", "launch", "--cpu"]
    found = run([*launch, "clip-train", *arguments(data, tmp_path / "run", samples_seen=64)])
    assert found.returncode == 0, found.stderr
    summary = json.loads(found.stdout)
    assert summary["status"] == "finished"
    assert summary["model"] == str(tmp_path / "run" / "model")
    module = [*launch, "-m", "clip_train"]
    again = run([*module, *arguments(data, tmp_path / "run", samples_seen=64)])
    assert json.loads(again.stdout)["status"] == "nothing left to do"


@pytest.mark.slow
def test_stops_with_its_launcher(data: Path, tmp_path: Path) -> None:
    """SIGTERM to `accelerate launch` alone, which dies of it and passes nothing on."""
    launch = ["accelerate", "launch", "--cpu", "clip-train"]
    process = start([*launch, *arguments(data, tmp_path / "run", samples_seen=160000)])
    wait_for_step(process, tmp_path / "run", 2)
    process.terminate()
    out, err = process.communicate(timeout=60)  # until the child has closed its own, too
    assert json.loads(out)["status"] == "stopped", err
    assert newest_state(tmp_path / "run") is not None


@pytest.mark.slow
def test_refuses_processes_that_train_alone(data: Path, tmp_path: Path) -> None:
    """accelerate's --multi_gpu without GPUs starts two that each believe they are alone."""
    hidden = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    found = run([*torchrun(2), *arguments(data, tmp_path / "run")], **hidden)
    assert found.returncode == 1
    assert "asked for 2 processes, but this one finds 1" in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bias", [None, pytest.param(-10.0, marks=pytest.mark.slow)])
def test_two_processes_equal_one(data: Path, tmp_path: Path, bias: float | None) -> None:
    """Same global batch: the same losses within 1e-5 for 20 steps, and the same order."""
    model = tmp_path / "model.json"  # with a bias: SigLIP's loss
    model.write_text(json.dumps(architecture("XS").to_dict() | {"init_logit_bias": bias}))
    settings = {"model": model, "batch_size": 16}
    one = run([*ALONE, *arguments(data, tmp_path / "one", **settings)])
    two = run([*torchrun(2), *arguments(data, tmp_path / "two", **settings)])
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert len(two.stdout.splitlines()) == 1  # rank 0 alone reports
    rows = list(
        zip(metrics.read_rows(tmp_path / "one"), metrics.read_rows(tmp_path / "two"), strict=True)
    )
    assert len(rows) == 20
    for alone, shared in rows:
        assert alone["loss"] == pytest.approx(shared["loss"], abs=1e-5)
        assert alone["order_hash"] == shared["order_hash"]
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "two")[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "threads", "changed"),
    [
        (1, 1, {"patch_dropout": 0.25}),
        (2, 1, {"patch_dropout": 0.25}),
        # a ResNet, and batches of a size that torch's CPU kernels divide among threads
        (1, 2, {"model": "tools/quickstart_model.json", "batch_size": 64, "samples_seen": 1280}),
    ],
    ids=["one", "two processes", "two threads"],
)
def test_killed_and_resumed(
    data: Path, tmp_path: Path, processes: int, threads: int, changed: dict[str, object]
) -> None:
    """SIGKILL at ten random steps: the weights of an uninterrupted run."""
    command = ALONE if processes == 1 else torchrun(processes)
    settings = changed | {"save_every": 3, "workers": 1, "ema": 0.9}
    omp = {"OMP_NUM_THREADS": str(threads)}
    whole = run([*command, *arguments(data, tmp_path / "whole", **settings)], **omp)
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "killed"
    chosen = random.Random(processes)
    for step in sorted(chosen.sample(range(1, 20), 10)):
        process = start([*command, *arguments(data, output, **settings)], **omp)
        wait_for_step(process, output, step)
        kill_all(process.pid)
        process.communicate()
    resumed = run([*command, *arguments(data, output, **settings)], **omp)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["order_hash"] == json.loads(whole.stdout)["order_hash"]
    for name in ("model", "model-ema"):
        expected, found = weights(tmp_path / "whole", name), weights(output, name)
        assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert [row["step"] for row in metrics.read_rows(output)] == list(range(1, 21))


SPREAD = [
    (2, {}),
    (4, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    (1, {}),
]


@pytest.mark.slow
def test_two_then_four_then_one_process(data: Path, tmp_path: Path) -> None:
    """DDP, FSDP2, alone: the stream, and within rounding the losses, of one process throughout."""
    settings = {"samples_seen": 140, "batch_size": 8, "ema": 0.9}
    whole = run([*ALONE, *arguments(data, tmp_path / "whole", **settings)])
    output = tmp_path / "spread"
    for number, (processes, variables) in enumerate(SPREAD, 1):
        command = ALONE if processes == 1 else torchrun(processes)
        process = start([*command, *arguments(data, output, **settings)], **variables)
        if number < len(SPREAD):
            wait_for_step(process, output, 5 * number)
            ranks = children(process.pid) if processes > 1 else [process.pid]
            leaders = [p for p in ranks if environment_of(p).get("RANK", "0") == "0"]
            os.kill(leaders[-1], signal.SIGTERM)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0 or number < len(SPREAD), err
    found, expected = metrics.read_rows(output), metrics.read_rows(tmp_path / "whole")
    assert [row["order_hash"] for row in found] == [row["order_hash"] for row in expected]
    assert json.loads(whole.stdout)["order_hash"] == found[-1]["order_hash"]
    for shared, alone in zip(found, expected, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)
    for name in ("model", "model-ema"):
        one, other = weights(tmp_path / "whole", name), weights(output, name)
        assert all(one[n].shape == other[n].shape for n in one)
        for n in one:
            torch.testing.assert_close(one[n], other[n], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both(data: Path, tmp_path: Path) -> None:
    """Rank 1 alone is told; both stop after the same step, and one process can go on."""
    output = tmp_path / "run"
    settings = {"samples_seen": 1600}
    process = start([*torchrun(2), *arguments(data, output, **settings)])
    wait_for_step(process, output, 3)
    ranks = [pid for pid in children(process.pid) if environment_of(pid).get("RANK") == "1"]
    os.kill(ranks[0], signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    summary = json.loads(out)
    assert summary["status"] == "stopped", err
    assert 3 <= summary["step"] < 100
    assert "exitcode  : 3" in err  # torchrun's own is 1
    state = json.loads((output / f"state/step-{summary['step']:08}/state.json").read_text())
    assert state["order_hash"] == summary["order_hash"]
    finished = run([*ALONE, *arguments(data, output, **settings)])
    assert json.loads(finished.stdout)["status"] == "finished", finished.stderr


def test_sigterm_exits_with_3(data: Path, tmp_path: Path) -> None:
    process = start([*ALONE, *arguments(data, tmp_path / "run", samples_seen=16000, workers=2)])
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert json.loads(out)["status"] == "stopped"


@pytest.mark.slow
def test_a_lost_process_ends_the_run(data: Path, tmp_path: Path) -> None:
    process = start([*torchrun(2), *arguments(data, tmp_path / "run", samples_seen=160000)])
    wait_for_step(process, tmp_path / "run", 2)
    ranks = [pid for pid in children(process.pid) if environment_of(pid).get("RANK") == "1"]
    os.kill(ranks[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Error: a process of the run was lost" in err


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


@pytest.mark.slow
def test_a_dead_worker_ends_the_run(data: Path, tmp_path: Path) -> None:
    """One loader of one of two processes is killed: both end, soon, and one says why."""
    output = tmp_path / "run"
    process = start([*torchrun(2), *arguments(data, output, samples_seen=160000, workers=1)])
    wait_for_step(process, output, 2)
    ranks = [pid for pid in children(process.pid) if environment_of(pid).get("RANK") == "1"]
    workers = [pid for pid in ranks if children(pid) == [] and pid != min(ranks)]
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Error: the data loader failed" in err
    assert "Traceback" not in err.split("torch/distributed/elastic")[0]
    assert newest_state(output) is not None, err  # not by --save-every, which is 500


def test_root_file_is_for_launchers() -> None:
    text = (ROOT / "clip-train").read_text()
    assert text.startswith("from clip_train.cli import main\n")
    assert len([line for line in text.splitlines() if line]) == 3


def test_an_error_in_a_step_ends_the_run_with_its_workers(data: Path, tmp_path: Path) -> None:
    """Workers ignore SIGTERM; an exit that waited for them would hang."""
    code = (
        "import sys, clip_train.loop\n"
        "def fail(*args, **kwargs): raise RuntimeError('a bug')\n"
        "clip_train.loop.Stepper.step = fail\n"
        "from clip_train.cli import main\n"
        "main(sys.argv[1:])"
    )
    process = run([sys.executable, "-c", code, *arguments(data, tmp_path / "run", workers=1)])
    assert process.returncode == 1
    assert "RuntimeError: a bug" in process.stderr
