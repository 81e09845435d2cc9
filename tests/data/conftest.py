"""Tiny folders of pictures, each of its own colour, with captions."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Clip = Callable[..., subprocess.CompletedProcess[str]]


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 9)) -> bytes:
    """An encoded picture whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number * 7 % 256, 50)).save(buffer, kind)
    return buffer.getvalue()


def write_captioned(folder: Path, n: int) -> Path:
    """n pictures with a caption beside each."""
    folder.mkdir(parents=True)
    for number in range(n):
        (folder / f"{number:03d}.png").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(f"picture {number}\n")
    return folder


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """A folder of pictures for each class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(picture(number))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Ten pictures with captions."""
    return write_captioned(tmp_path / "captioned", 10)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting workers takes a second: they are left to the tests that are about them."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def clip_data() -> Clip:
    """Run the installed command."""
    command = Path(sys.executable).with_name("clip-data")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *map(str, arguments)], capture_output=True, text=True, timeout=60
        )

    return run
