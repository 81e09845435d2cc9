"""The commands end to end, and what a user sees when something is wrong."""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import clip_finetune
import pytest
from click.testing import CliRunner
from clip_finetune.cli import main
from clip_finetune.config import TrainConfig
from clip_models import list_heads

FAST = ["--iterations", "20", "--batch-size", "16", "--warmup", "2", "--lr", "1e-3"]


def run(*arguments: object, status: int = 0) -> str:
    """stdout of the command, or stderr where it fails."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_train_interpolate_curve(base: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    tuned, mixed, plots = tmp_path / "tuned", tmp_path / "mixed", tmp_path / "curve"
    trained = json.loads(run("train", base, tuned, "--task", digits_set, "--workers", 0, *FAST))
    assert trained["status"] == "trained"
    assert trained["tasks"] == {"digits": 200}
    curve = ["curve", base, tuned, plots, "--id", digits_set, "--ood", inverted_set]
    points = json.loads(run(*curve, "--alphas", "0,0.5,1", "--workers", 0))["points"]
    assert [point["alpha"] for point in points] == [0, 0.5, 1]
    assert points[-1]["test"]["id"] > points[0]["test"]["id"]
    run("interpolate", base, tuned, mixed, "--alpha", 0.5)
    assert list_heads(mixed) == ["digits"]
    again = json.loads(run("train", base, tuned, "--task", digits_set, *FAST))
    assert again["status"] == "nothing left to do"


def test_expected_failures_are_one_line(base: Path, digits_set: Path, tmp_path: Path):
    for arguments in (
        ("train", tmp_path / "no-model", tmp_path / "o", "--task", digits_set),
        ("train", base, tmp_path / "o", "--task", tmp_path / "no-set"),
        ("train", base, tmp_path / "o", "--task", digits_set, "--train-split", "dev"),
        ("interpolate", base, tmp_path / "no-model", tmp_path / "o", "--alpha", 0.5),
        ("interpolate", base, base, tmp_path / "o", "--alpha", -1),
        ("curve", base, base, tmp_path / "o", "--id", digits_set, "--ood", digits_set),
    ):
        message = run(*arguments, status=1)
        assert message.startswith("Error: "), message
        assert message.count("\n") == 1, message
        assert not (tmp_path / "o").exists()


def test_usage_errors(base: Path, digits_set: Path):
    assert "--task" in run("train", base, "o", status=2)
    run("curve", base, base, "o", "--id", "a", "--ood", "b", "--alphas", "0;1", status=2)
    run("train", base, "o", "--task", digits_set, "--precision", "fp8", status=2)
    run("train", base, "o", "--task", digits_set, "--warmup", 9999, status=2)


def test_every_command_and_option_has_help():
    for command in (main, *main.commands.values()):
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"


def test_train_options_are_the_config():
    options = {p.name: p for p in main.commands["train"].params if isinstance(p, click.Option)}
    assert list(options) == [field.name for field in fields(TrainConfig)]
    assert TrainConfig(task=(Path("x"),)) == TrainConfig(
        task=(Path("x"),), **{n: p.default for n, p in options.items() if n != "task"}
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from clip_finetune.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'accelerate', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert clip_finetune.__all__ == [
        "FinetuneError", "LabelledSet", "TrainConfig", "interpolate_models", "measure_curve",
        "open_set", "train",
    ]  # fmt: skip
    assert all(getattr(clip_finetune, name) is not None for name in clip_finetune.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        clip_finetune.nonsense  # noqa: B018


@pytest.mark.slow
def test_two_processes_are_one(base: Path, digits_set: Path, tmp_path: Path):
    """The same global batches in 1 and 2 processes: the same losses to rounding."""
    options = ["--task", digits_set, "--workers", "0", *FAST]
    run("train", base, tmp_path / "1", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "clip_finetune", "train", base, tmp_path / "2", *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "trained"  # one JSON for both
    losses = [
        [json.loads(row)["loss"] for row in (out / "training/metrics.jsonl").open()]
        for out in (tmp_path / "1", tmp_path / "2")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_sigterm_exits_with_3(base: Path, digits_set: Path, tmp_path: Path):
    options = ["--task", digits_set, "--workers", "1", *FAST, "--iterations", "100000"]
    command = [sys.executable, "-m", "clip_finetune", "train", base, tmp_path / "out", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "out.state/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    result = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 3
    assert result["status"] == "stopped"
    assert result["step"] == metrics.read_text().count("\n")
    assert (tmp_path / "out.state/state.pt").is_file()
