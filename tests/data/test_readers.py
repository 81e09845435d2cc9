"""Others' libraries read what we write. Those that do not fit the lock: tools/peer_readers.py."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset
from clip_data import build
from torch.utils.data import DataLoader

from .conftest import picture, write_captioned, write_classes


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_shards(captioned: Path, tmp_path: Path, streaming: bool) -> None:
    build(captioned, tmp_path / "out", samples_per_shard=6)
    for number, row in enumerate(load(tmp_path / "out", tmp_path, streaming)):
        assert row["__key__"] == f"{number // 6:05d}{number % 6:04d}"
        assert row["png"].getpixel((0, 0)) == (number, number * 7, 50)
        assert row["txt"] == f"picture {number}"
        assert row["json"]["image"] == f"{number:03d}.png"
        assert (row["json"]["width"], row["json"]["height"]) == (12, 9)
    assert number == 9


def test_datasets_reads_a_labelled_set(tmp_path: Path) -> None:
    source = write_classes(tmp_path / "in", {"dog": 2, "cat": 3})
    build(source, tmp_path / "set", split="train", samples_per_shard=2)
    rows = load(tmp_path / "set/train", tmp_path, streaming=True)
    assert [row["cls"] for row in rows] == [0, 0, 0, 1, 1]


def load(folder: Path, cache: Path, streaming: bool) -> Any:
    """All the shards of a folder as a data set of datasets'."""
    files = sorted(map(str, folder.glob("*.tar")))
    return datasets.load_dataset(
        "webdataset",
        data_files={"train": files},
        split="train",
        streaming=streaming,
        cache_dir=str(cache / "cache"),
    )


def test_webdataset_reads_mixed_formats_in_two_workers(tmp_path: Path) -> None:
    """As a trainer does: whatever the format, shards split between the loader's workers."""
    source = write_captioned(tmp_path / "in", 12)
    for number, kind in enumerate(["JPEG", "WEBP"] * 6):
        (source / f"{number:03d}.png").write_bytes(picture(number, kind))
    build(source, tmp_path / "out", samples_per_shard=3)
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    stream = (
        webdataset.WebDataset([str(tmp_path / "out" / name) for name in sizes], shardshuffle=False)
        .decode("rgb8")
        .to_tuple("jpg;png;webp", "txt")
    )
    pairs = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(text for _, text in pairs) == sorted(f"picture {n}" for n in range(12))
    assert {tuple(image.shape) for image, _ in pairs} == {(9, 12, 3)}
    assert sum(sizes.values()) == len(pairs)
