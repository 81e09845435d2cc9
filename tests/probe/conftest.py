"""Digits as a labelled set, a tiny random model, and a writer of other sets; one thread."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clip_models import CLIP, ModelConfig, Preprocess, save_model
from PIL import Image
from sklearn.datasets import load_digits

torch.set_num_threads(1)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Label = int | np.ndarray
Rows = Iterable[tuple[bytes, Label]]  # encoded image, label; or a 0 or 1 for each class
WriteSet = Callable[..., Path]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def digit(image: np.ndarray) -> bytes:
    gray = Image.fromarray((255 - image * 255 / 16).astype(np.uint8))
    return png(np.asarray(gray.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)))


def write_labelled_set(
    path: Path,
    splits: dict[str, Rows],
    names: list[str] = NAMES,
    templates: tuple[str, ...] = ('a photo of the number: "{c}".', "a drawing of {c}."),
    extension: str = "png",
    shards: int = 2,
) -> Path:
    """CLIP_benchmark's layout without any sidecar."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "classnames.txt").write_text("\n".join(names) + "\n")
    (path / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    for split, rows in splits.items():
        folder, listed = path / split, list(rows)
        folder.mkdir()
        (folder / "nshards.txt").write_text(f"{shards}\n")
        for shard in range(shards):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for i, (image, label) in list(enumerate(listed))[shard::shards]:
                    for ending, data in ((extension, image), label_member(label)):
                        info = tarfile.TarInfo(f"s{i:07d}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return path


def label_member(label: Label) -> tuple[str, bytes]:
    """The extension and content of a label's file."""
    if isinstance(label, int):
        return "cls", str(label).encode()
    out = io.BytesIO()
    np.save(out, label)
    return "npy", out.getvalue()


def digit_rows() -> list[tuple[bytes, int]]:
    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return [(digit(data.images[i]), int(data.target[i])) for i in order]


@pytest.fixture(scope="session")
def rows() -> list[tuple[bytes, int]]:
    """The 1,797 digits, shuffled."""
    return digit_rows()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[bytes, int]]) -> Path:
    """train 300, val 100, test 400."""
    splits: dict[str, Rows] = {"train": rows[:300], "val": rows[300:400], "test": rows[400:800]}
    return write_labelled_set(tmp_path_factory.mktemp("sets") / "digits", splits)


PROPERTIES = ["even", "odd", "prime", "small", "a letter"]


@pytest.fixture(scope="session")
def properties(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[bytes, int]]) -> Path:
    """200 digits with many labels each; one class has no image."""
    test = [
        (image, np.array([d % 2 == 0, d % 2 == 1, d in (2, 3, 5, 7), d < 5, False], np.int64))
        for image, d in rows[400:600]
    ]
    folder = tmp_path_factory.mktemp("sets") / "properties"
    path = write_labelled_set(folder, {"test": test}, PROPERTIES)
    (path / "dataset_type.txt").write_text("multilabel\n")
    return path


@pytest.fixture(scope="session")
def write_set() -> WriteSet:
    return write_labelled_set


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model of 32-pixel images with random weights."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {"width": 64, "heads": 2, "layers": 2},
    }
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, CLIP(ModelConfig.from_dict(config)), Preprocess(32))
    return path


@pytest.fixture
def run() -> Callable[..., list[dict[str, Any]]]:
    """Run the command in this process; its JSON lines."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


@pytest.fixture
def fail() -> Callable[..., str]:
    """Run the command, which fails as expected (exit 1, one line, no output); the line."""

    def fail(*arguments: object) -> str:
        result = invoke(*arguments)
        assert result.exit_code == 1, (result.output, result.exception)
        assert result.stdout == ""
        (line,) = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
        return line

    return fail


@pytest.fixture
def kill_at() -> Callable[[int, Callable[[], object]], bool]:
    """Do some work in a forked process, which SIGKILL ends at its n-th rename; whether it came."""

    def kill_at(number: int, work: Callable[[], object]) -> bool:
        if (child := os.fork()) == 0:
            replace, renames = os.replace, iter(range(number - 1))

            def rename(source: Any, target: Any) -> None:
                if next(renames, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = rename
            try:
                work()
            finally:
                os._exit(0)
        return os.waitpid(child, 0)[1] == signal.SIGKILL

    return kill_at


def invoke(*arguments: object) -> Any:
    from clip_probe.cli import main

    command, *rest = arguments
    # before the others, so that these may differ
    encoding = ["--workers", "0", "--device", "cpu"]
    encoding = [] if command in ("compare", "robustness") else encoding
    return CliRunner().invoke(main, [str(a) for a in (command, *encoding, *rest)])
