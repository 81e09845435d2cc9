"""Tiny random models and scikit-learn's digits as labelled sets."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_finetune import TrainConfig
from clip_models import CLIP, ModelConfig, Preprocess, load_model, save_model
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 16
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4}
RESNET = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}

Write = Callable[..., Path]


def png(pixels: np.ndarray) -> bytes:
    """An 8x8 digit of 0..16 as a 16x16 PNG."""
    grey = np.kron(np.clip(pixels * 15, 0, 255).astype(np.uint8), np.ones((2, 2), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_set(
    path: Path,
    splits: dict[str, Iterable[tuple[bytes, int]]],
    names: list[str] = NAMES,
    templates: str = "a photo of the number {c}.\nthe digit {c}.\n",
    shards: int = 2,
) -> Path:
    """A labelled set in CLIP_benchmark's layout, without sidecars."""
    path.mkdir(parents=True)
    (path / "classnames.txt").write_text("\n".join(names) + "\n")
    (path / "zeroshot_classification_templates.txt").write_text(templates)
    for split, samples in splits.items():
        folder = path / split
        folder.mkdir()
        (folder / "nshards.txt").write_text(f"{shards}\n")
        for number in range(shards):
            with tarfile.open(folder / f"{number}.tar", "w") as tar:
                for row, (image, label) in list(enumerate(samples))[number::shards]:
                    add(tar, f"s{row:07d}.cls", str(label).encode())
                    add(tar, f"s{row:07d}.png", image)
    return path


def digits(first: int, count: int, change: Callable[[np.ndarray], np.ndarray] = lambda x: x):
    data = load_digits()
    rows = range(first, first + count)
    return [(png(change(data.images[row])), int(data.target[row])) for row in rows]


@pytest.fixture(scope="session")
def digits_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "digits"
    splits = {"train": digits(0, 200), "val": digits(200, 60), "test": digits(300, 60)}
    return write_set(path, splits)


@pytest.fixture(scope="session")
def inverted_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same classes under a shift, in another order."""

    def samples(first: int, count: int):
        rows = digits(first, count, lambda x: 16 - x)
        return [(image, 9 - label) for image, label in rows]

    path = tmp_path_factory.mktemp("sets") / "inverted"
    splits = {"train": samples(400, 60), "val": samples(500, 50), "test": samples(600, 50)}
    return write_set(path, splits, names=NAMES[::-1])


def save_random_model(path: Path, vision: dict[str, object], seed: int = 0) -> Path:
    config = ModelConfig.from_dict(
        {
            "embed_dim": 24,
            "vision_cfg": {"image_size": SIZE, **vision},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
        }
    )
    torch.manual_seed(seed)
    model = CLIP(config)
    with torch.no_grad():
        model.text.text_projection.mul_(3)
    save_model(path, model, Preprocess(SIZE), provenance={"tool": "test"})
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "base", VIT)


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "resnet", RESNET)


@pytest.fixture(scope="session")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with an image tower that moved."""
    loaded = load_model(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("models") / "finetuned"
    save_model(path, loaded.model, loaded.preprocess, provenance={"tool": "test"})
    return path


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of `base` that a test may add heads to."""
    return Path(shutil.copytree(base, tmp_path / "own-base"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).model.state_dict()


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def config(*tasks: Path, **changes: object) -> TrainConfig:
    """A run of a second."""
    settings = {"iterations": 12, "batch_size": 16, "lr": 1e-3, "warmup": 2, "workers": 0}
    return TrainConfig(task=tasks, **(settings | changes))


def metrics(out: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, but for the time they took."""
    rows = [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
