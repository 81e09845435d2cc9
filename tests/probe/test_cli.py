"""Help for everything, at no cost; public names."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import clip_probe
import pytest
from click.testing import CliRunner
from clip_models import Preprocess
from clip_probe.cli import main


def test_every_command_and_option_has_help() -> None:
    for command in main.commands.values():
        assert command.help
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (command.name, option.name)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in main.commands)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom clip_probe.cli import main\n"
        f"main({arguments}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["zeroshot", "model"],
        ["eval", "model", "set"],
        ["zeroshot", "model", "set", "--precision", "fp16"],
        ["suite", "suite.toml"],
        ["compare", "one"],
        ["robustness", "results.jsonl"],
        ["sweep", "model", "set", "--shots", "1,0"],
        ["sweep", "model", "set", "--shots", "few"],
        ["sweep", "model", "set", "--seeds", "0"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_public_names() -> None:
    expected = ["ProbeError", "evaluate_heads", "fit_grid", "sweep", "zeroshot"]
    assert clip_probe.__all__ == expected
    for name in expected * 2:  # a module that is imported becomes a name too
        value: Any = getattr(clip_probe, name)
        assert value.__doc__
        assert callable(value), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clip_probe.nothing  # noqa: B018


def test_a_dead_worker_is_one_line(
    fail: Callable[..., str], model_dir: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Preprocess, "eval", killed)
    assert "--workers" in fail("zeroshot", model_dir, digits, "--workers", 1)
