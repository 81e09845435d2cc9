"""A tiny random model and a few tiny shards, made once."""

import io
import json
import os
import random
import signal
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import CLIP, ModelConfig, Preprocess, save_model
from clip_retrieval import embed_source
from PIL import Image

import faiss  # isort: skip

WORDS = ["red", "blue", "cat", "dog", "house", "tree", "river", "cloud", "stone", "light"]


def make_model(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig.from_dict(
        {
            "embed_dim": 32,
            "vision_cfg": {
                "image_size": 32,
                "patch_size": 16,
                "layers": 1,
                "width": 64,
                "head_width": 32,
            },
            "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 1},
        }
    )
    save_model(path, CLIP(config), Preprocess(32))
    return path


def picture(seed: int) -> bytes:
    rng = random.Random(seed)
    image = Image.new("RGB", (4, 4))
    for x in range(4):
        for y in range(4):
            image.putpixel((x, y), tuple(rng.randrange(256) for _ in range(3)))
    file = io.BytesIO()
    image.resize((40, 40), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def caption(seed: int) -> str:
    return f"{' '.join(random.Random(seed).choices(WORDS, k=4))} number {seed}"


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def training_sample(shard: int, row: int) -> tuple[str, dict[str, bytes]]:
    seed = shard * 1000 + row
    key = f"{shard:05d}{row:04d}"
    members = {"png": picture(seed), "txt": caption(seed).encode()}
    return key, members | {"json": json.dumps({"seed": seed}).encode()}


def make_shards(directory: Path, counts: tuple[int, ...] = (20, 13, 7)) -> Path:
    for shard, count in enumerate(counts):
        write_tar(
            directory / f"{shard:05d}.tar", (training_sample(shard, row) for row in range(count))
        )
    return directory


def write_vectors(path: Path, count: int, seed: int = 0, spread: float = 1) -> Path:
    """Embeddings without a model or captions: unit rows around an axis."""
    rows = spread * np.random.default_rng(seed).normal(size=(count, 32)) + np.eye(32)[0]
    (path / "img_emb").mkdir(parents=True)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(path / "img_emb" / "img_emb_0.npy", unit.astype(np.float32))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def large_embeddings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 pictures and captions, in two parts."""
    path = tmp_path_factory.mktemp("large")
    embed_source(model, make_shards(path / "shards", (500, 200)), path / "embeddings", workers=0)
    return path / "embeddings"


@pytest.fixture(scope="session")
def retrieval_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP_benchmark's layout, two shards, one to three captions an image."""
    root = tmp_path_factory.mktemp("sets") / "tiny"
    for shard in range(2):
        samples = []
        for row in range(10):
            seed = shard * 10 + row
            lines = [caption(seed + 100 * n) for n in range(1 + seed % 3)]
            samples.append(
                (f"s{seed:07d}", {"png": picture(seed), "txt": "\n".join(lines).encode()})
            )
        write_tar(root / "test" / f"{shard}.tar", samples)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def killed_twenty_times(work: Callable[[], object]) -> Iterator[bool]:
    """SIGKILL the work at random moments until twenty met it at work; after each, whether it did.

    Raises:
        AssertionError: the work failed by itself, or is never met.
    """
    moments, met = random.Random(0), list[bool]()
    while sum(met) < 20:
        assert len(met) < 100, f"only {sum(met)} of {len(met)} kills met it at work"
        met.append(_killed(work, moments.uniform(0, 0.25)))
        yield met[-1]


def _killed(work: Callable[[], object], seconds: float) -> bool:
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # a forked child has no OpenMP threads to share work with
        faiss.omp_set_num_threads(1)
        try:
            work()
            os._exit(0)
        except BaseException:  # in a fork nothing may reach pytest; the parent is told
            traceback.print_exc()
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the work failed by itself: status {status}"
    return status != 0
