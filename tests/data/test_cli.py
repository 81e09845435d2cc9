"""The installed command: exit codes, JSON on stdout, one clean line on stderr."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import clip_data
from clip_data.cli import main

from .conftest import Clip


def test_build_then_nothing_left_to_do(captioned: Path, tmp_path: Path, clip_data: Clip) -> None:
    out = tmp_path / "out"
    first = clip_data("build", captioned, out)
    assert (first.returncode, first.stderr) == (0, "")
    assert json.loads(first.stdout) == {
        "output": str(out),
        "samples": 10,
        "failed": 0,
        "reasons": {},
        "remarks": {},
        "shards": 1,
        "bytes": (out / "00000.tar").stat().st_size,
    }
    second = clip_data("build", captioned, out)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert second.stderr == f"{out} is complete: nothing left to do\n"


def test_verify_exit_codes(captioned: Path, tmp_path: Path, clip_data: Clip) -> None:
    out = tmp_path / "out"
    clip_data("build", captioned, out)
    sound = clip_data("verify", out)
    assert (sound.returncode, json.loads(sound.stdout)["faults"]) == (0, {})
    (out / "00000.index.json").unlink()
    faulty = clip_data("verify", out)
    assert (faulty.returncode, faulty.stderr) == (1, "")
    assert json.loads(faulty.stdout)["faults"] == {"missing index": 1}


def test_expected_failures_are_one_line(captioned: Path, tmp_path: Path, clip_data: Clip) -> None:
    (captioned / "000.png").write_text("not an image")
    for arguments in (
        ["build", tmp_path / "absent", tmp_path / "out"],
        ["build", captioned, tmp_path / "out", "--max-error-share", "0"],
        ["build", captioned, captioned / "000.png"],
        ["verify", tmp_path],
    ):
        result = clip_data(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


def test_usage_errors(captioned: Path, tmp_path: Path, clip_data: Clip) -> None:
    for arguments in (
        ["build", captioned],
        ["build", captioned, tmp_path / "out", "--samples-per-shard", "0"],
        ["build", captioned, tmp_path / "out", "--max-error-share", "2"],
    ):
        assert clip_data(*arguments).returncode == 2


def test_everything_has_help() -> None:
    for command in main.commands.values():
        assert command.help
        options = [param for param in command.params if isinstance(param, click.Option)]
        assert all(option.help for option in options)


def test_help_is_cheap() -> None:
    code = (
        "import sys; from clip_data.cli import main;"
        "main(['build', '--help'], standalone_mode=False);"
        "print({'torch', 'numpy', 'pyarrow', 'PIL', 'tqdm'} & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--max-error-share" in result.stdout
    assert result.stderr == "set()\n"


def test_public_names() -> None:
    assert clip_data.__all__ == [
        "ColumnOptions",
        "DataError",
        "DedupReport",
        "DownloadOptions",
        "Fault",
        "ImageOptions",
        "Indexed",
        "Inspection",
        "Report",
        "Selected",
        "Summary",
        "build",
        "dedup",
        "filter_shards",
        "index_shards",
        "inspect",
        "subset",
        "verify",
    ]
    for name in clip_data.__all__ * 2:  # a module of the same name would take its place
        assert not isinstance(getattr(clip_data, name), ModuleType), name
    assert callable(clip_data.build)
