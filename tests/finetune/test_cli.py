"""The commands end to end, and what a user sees when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import clip_finetune
import pytest
import torch
from click.testing import CliRunner
from clip_finetune.cli import main
from clip_finetune.config import CurveConfig, TrainConfig
from clip_finetune.recipes import RECIPES
from clip_models import Preprocess, fingerprint_of, list_heads

from .conftest import metrics, weights

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
    souped = json.loads(run("soup", base, tuned, tmp_path / "soup", "--weights", "0.5,0.5"))
    assert souped["fingerprint"] == fingerprint_of(mixed)
    patched = ["curve", base, tuned, tmp_path / "p", "--id", digits_set, "--control", inverted_set]
    assert json.loads(run(*patched, "--max-loss", 100, "--workers", 0))["max_loss"] == 100


def test_expected_failures_are_one_line(base: Path, digits_set: Path, tmp_path: Path):
    for arguments in (
        ("train", tmp_path / "no-model", tmp_path / "o", "--task", digits_set),
        ("train", base, tmp_path / "o", "--task", tmp_path / "no-set"),
        ("train", base, tmp_path / "o", "--task", digits_set, "--train-split", "dev"),
        ("interpolate", base, tmp_path / "no-model", tmp_path / "o", "--alpha", 0.5),
        ("interpolate", base, base, tmp_path / "o", "--alpha", -1),
        ("soup", base, tmp_path / "o"),
        ("interpolate", base, base, tmp_path / "o", "--alpha", "nan", "--extrapolate"),
        ("soup", base, base, tmp_path / "o", "--weights", "1,1"),
        ("soup", base, base, tmp_path / "o", "--weights", "nan,1"),
        ("train", base, tmp_path / "o", "--task", digits_set, "--warmup", 9999, "--dry-run"),
        ("train", base, tmp_path / "o", "--task", digits_set, "--warmup", 9999),
        ("train", base, tmp_path / "o", "--task", digits_set, "--augment", "nonsense"),
        ("curve", base, base, tmp_path / "o", "--id", digits_set, "--ood", digits_set),
    ):
        message = run(*arguments, status=1)
        assert message.startswith("Error: "), message
        assert message.count("\n") == 1, message
        assert not (tmp_path / "o").exists()


def test_usage_errors(base: Path, digits_set: Path):
    assert "--task" in run("train", base, "o", status=2)
    for options in (
        ("--alphas", "0;1"),
        ("--alphas", "0,1,nan", "--extrapolate"),
        ("--max-loss", "nan"),
    ):
        run("curve", base, base, "o", "--id", "a", "--ood", "b", *options, status=2)
    both = ("train", base, "o", "--task", digits_set, "--iterations", 9, "--epochs", 1)
    assert "not both" in run(*both, status=2)
    run("train", base, "o", "--task", digits_set, "--precision", "fp8", status=2)
    run("train", base, "o", "--task", digits_set, "--recipe", "none", status=2)
    run("soup", base, base, "o", "--weights", "1;1", status=2)
    assert "--lr is" in run("train", base, "o", "--task", digits_set, "--lr", 0, status=2)
    assert "--head" in run("train", base, "o", "--task", digits_set, "--recipe", "lp-ft", status=2)


def test_every_command_and_option_has_help():
    for command in (main, *main.commands.values()):
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"


@pytest.mark.parametrize(
    ("name", "config", "more", "given"),
    [
        ("train", TrainConfig, {"recipe", "dry_run"}, {"task": (Path("x"),)}),
        ("curve", CurveConfig, set(), {"id": (Path("x"),), "ood": (Path("y"),)}),
    ],
)
def test_options_are_the_config(name, config, more, given):
    options = {p.name: p for p in main.commands[name].params if isinstance(p, click.Option)}
    assert options.keys() - more == {field.name for field in fields(config)}
    defaults = {n: p.default for n, p in options.items() if n not in {*more, *given}}
    assert config(**given) == config(**given, **defaults)


def test_recipe_fills_in_and_options_win(base: Path, digits_set: Path):
    def plan(*options: object) -> dict:
        return json.loads(run("train", base, "o", "--task", digits_set, *options, "--dry-run"))

    joint = plan("--recipe", "joint-8")
    assert (joint["steps"], joint["warmup"], joint["method"]) == (2000, 200, "frozen-head")
    assert joint["warnings"] == []
    wise = plan("--recipe", "wise-ft", "--warmup", 2, "--batch-size", 250)
    assert (wise["steps"], wise["warmup"], wise["method"]) == (8, 2, "end-to-end")
    assert "holds its 200 images several times" in wise["warnings"][0]
    assert wise["learning"] - joint["learning"] == 10 * 24 + 10  # the head
    assert plan("--recipe", "wise-ft", "--iterations", 700)["steps"] == 700
    flyp = plan("--recipe", "flyp", "--warmup", 0.2, "--batch-size", 20, "--epochs", 0.5)
    assert flyp["steps"] == 5
    assert flyp["learning"] == flyp["parameters"]
    assert "only 50% of its images are seen" in flyp["warnings"][0]
    assert plan("--image-size", 24)["image_size"] == 24
    text = run("train", "--help")
    assert all(name in text.replace("\n", " ") for name in RECIPES)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from clip_finetune.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'accelerate', 'safetensors', 'timm', 'PIL'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert clip_finetune.__all__ == [
        "CurveConfig", "FinetuneError", "LabelledSet", "TrainConfig", "interpolate_models",
        "measure_curve", "open_set", "soup_models", "train",
    ]  # fmt: skip
    assert all(getattr(clip_finetune, name) is not None for name in clip_finetune.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        clip_finetune.nonsense  # noqa: B018


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
CPU = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["end-to-end", "flyp"])
def test_two_processes_are_one(
    base: Path, digits_set: Path, inverted_set: Path, tmp_path: Path, method: str
):
    """The same global batches in 1 and 2 processes: the same losses and weights to rounding."""
    tasks = ["--task", digits_set, "--task", inverted_set]
    options = [*tasks, "--workers", "0", *FAST, "--lr", "1e-4", "--method", method]
    run("train", base, tmp_path / "1", *options)
    done = subprocess.run(
        [*TORCHRUN, "-m", "clip_finetune", "train", base, tmp_path / "2", *options],
        env=CPU, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "trained"  # one JSON for both
    rows = [metrics(out) for out in (tmp_path / "1", tmp_path / "2")]
    for key in ("loss", "accuracy", "lr"):
        one, two = ([row[key] for row in of_run] for of_run in rows)
        assert one == pytest.approx(two, abs=1e-4), key
    states = [weights(out) for out in (tmp_path / "1", tmp_path / "2")]
    for name, weight in states[0].items():
        if not name.endswith("in_proj_bias"):  # the key bias is rounding noise (test_train.py)
            torch.testing.assert_close(weight, states[1][name], atol=1e-4, rtol=0)


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


@pytest.mark.slow
def test_a_lost_process_is_one_line(base: Path, digits_set: Path, tmp_path: Path):
    options = ["--task", digits_set, "--workers", "0", *FAST, "--iterations", "100000"]
    command = [*TORCHRUN, "-m", "clip_finetune", "train", base, tmp_path / "out", *options]
    process = subprocess.Popen(
        command, env=CPU, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "out.state/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.1)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    for pid in " ".join(task.read_text() for task in tasks).split():
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Error: a process of the run was lost, or does not answer" in error
    assert "Traceback" not in error.split("torch/distributed/elastic")[0]


def test_a_dead_worker_is_one_line(
    base: Path,
    digits_set: Path,
    inverted_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Preprocess, "eval", killed)
    sets = ["--id", digits_set, "--ood", inverted_set, "--workers", 1]
    error = run("curve", base, base, tmp_path / "curve", *sets, status=1)
    assert "Error: a process that decodes images was lost" in error
