"""Every command that the README shows, run in its order on the quickstart's files."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from .conftest import ROOT, environment

README = (ROOT / "README.md").read_text()
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(command, the output shown) of the console blocks."""
    found: list[tuple[str, str]] = []
    for block in CONSOLE:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.replace("\\\n", " ").partition("\n")
            found.append((command, output))
    return found


def test_the_first_two_lines_are_the_two_commands() -> None:
    """The first is run by the fixture of this folder; the second is this test run."""
    assert README.count("pip install uv && uv run tools/quickstart.sh") == 1
    assert README.count("pip install uv && uv run pytest") == 1


def test_nothing_else_is_shown_as_a_command() -> None:
    fences = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert set(fences) <= {"console", "text", "python", ""}
    assert README.count("```sh") == 0


@pytest.mark.slow
def test_commands_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    # from a directory that looks like the repository root after the quickstart
    for name in ("clip-train", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "quickstart").symlink_to(out)
    assert len(commands()) >= 10
    for command, shown in commands():
        uv, run, *words = shlex.split(command)
        assert (uv, run) == ("uv", "run"), command  # the tests are in that environment already
        stdout = run_command(words, tmp_path)
        for line in shown.splitlines():
            if line.startswith("{"):  # the keys shown are those printed; figures differ
                printed = [json.loads(row) for row in stdout.splitlines() if row[:1] == "{"]
                assert any(json.loads(line).keys() <= row.keys() for row in printed), command


def run_command(words: list[str], folder: Path) -> str:
    """What a command prints; a server is told to end when it has said where it is."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    log = folder / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment() | threads,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdout
        first = process.stdout.readline()
        if "serve" in words:
            process.terminate()
        rest = process.communicate()[0]
    assert process.returncode == 0, f"{words}\n{log.read_text()}"
    return first + rest
