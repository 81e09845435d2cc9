"""What the repository promises as a whole."""

import ast
import os
import subprocess
import sys
from importlib.metadata import requires
from importlib.metadata import version as distribution_version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ["clip-data", "clip-models", "clip-train", "clip-retrieval", "clip-probe", "clip-finetune"]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_needs_no_heavy_import(tool: str) -> None:
    module = tool.replace("-", "_")
    code = f"""
import sys
from {module}.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "numpy", "pyarrow", "faiss", "matplotlib", "sklearn", "PIL", "timm"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("tool", ["clip-train", "clip-retrieval", "clip-probe", "clip-finetune"])
@pytest.mark.parametrize(("processes", "end"), [("1", "shut down\n"), ("2", "")])
def test_several_processes_end_without_shutdown(tool: str, processes: str, end: str) -> None:
    """In which gloo's threads may abort them."""
    code = f"""
import atexit
from {tool.replace("-", "_")}.cli import main
atexit.register(print, "shut down")
main(["--version"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"WORLD_SIZE": processes},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    version, rest = result.stdout.split("\n", 1)
    assert version.endswith(f"version {distribution_version(tool)}")
    assert rest == end


@pytest.mark.parametrize("tool", TOOLS)
def test_every_command_and_option_has_help(tool: str) -> None:
    import click

    module = __import__(f"{tool.replace('-', '_')}.cli", fromlist=["main"])
    pending: list[tuple[str, click.Command]] = [(tool, module.main)]
    while pending:
        name, command = pending.pop()
        assert command.help, f"{name} has no help"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]} has no help"
        if isinstance(command, click.Group):
            pending += [(f"{name} {sub}", child) for sub, child in command.commands.items()]


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_dependencies_between_packages() -> None:
    for tool in TOOLS:
        ours = {r.split()[0].split(">")[0] for r in requires(tool) or []} & set(TOOLS)
        assert ours == (set() if tool in ("clip-data", "clip-models") else {"clip-models"}), tool


def test_source_stays_small() -> None:
    files = list(ROOT.glob("packages/*/src/*/*.py"))
    assert sum(lines_of_code(file.read_text()) for file in files) < 19_000
    lengths = {str(file): len(file.read_text().splitlines()) for file in files}
    assert {name: n for name, n in lengths.items() if n > 300} == {}


def lines_of_code(source: str) -> int:
    """Lines that are neither blank, nor of a comment, nor of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented.update(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = (line.strip() for line in source.splitlines())
    code = {n for n, line in enumerate(lines, 1) if line and not line.startswith("#")}
    return len(code - documented)
