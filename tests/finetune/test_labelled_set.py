import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from clip_finetune import FinetuneError, open_set

from .conftest import NAMES, add, digits, write_set


def test_same_samples_as_webdataset(digits_set: Path):
    data = open_set(digits_set, "train")
    urls = [str(digits_set / "train" / f"{number}.tar") for number in range(2)]
    expected = [(s["png"], int(s["cls"])) for s in wds.WebDataset(urls, shardshuffle=False)]
    assert [(data.read(i), int(data.label_N[i])) for i in range(len(data))] == expected
    assert data.class_names == tuple(NAMES)
    assert len(data) == 200
    assert data.name == "digits"


def test_index_file_replaces_the_scan(digits_set: Path, tmp_path: Path):
    copy = Path(shutil.copytree(digits_set, tmp_path / "copy"))
    scanned = open_set(copy, "test")
    for tar in sorted((copy / "test").glob("*.tar")):
        keys, places = [], {"png": [], "cls": []}
        with tarfile.open(tar) as archive:
            for member in archive:
                key, suffix = member.name.split(".")
                keys += [key] if suffix == "cls" else []
                places[suffix].append([member.offset_data, member.size])
        index = {"format": 1, "tar_bytes": tar.stat().st_size, "keys": keys, "members": places}
        tar.with_suffix(".index.json").write_text(json.dumps(index))
    indexed = open_set(copy, "test")
    assert np.array_equal(indexed.offset_N, scanned.offset_N)
    assert indexed.fingerprint() == scanned.fingerprint()

    index["keys"] = index["keys"][:3]  # a stale index (another tar size) is not believed
    index["tar_bytes"] += 1
    tar.with_suffix(".index.json").write_text(json.dumps(index))
    assert len(open_set(copy, "test")) == len(scanned)


def test_other_words_are_another_set(digits_set: Path, tmp_path: Path):
    copy = Path(shutil.copytree(digits_set, tmp_path / "digits"))
    assert open_set(copy, "val").fingerprint() == open_set(digits_set, "val").fingerprint()
    (copy / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    assert open_set(copy, "val").fingerprint() != open_set(digits_set, "val").fingerprint()


def test_an_empty_class_name_is_a_class(tmp_path: Path):
    names = ["near", "", "far"]
    data = open_set(write_set(tmp_path / "s", {"test": [(b"x", 2)]}, names=names), "test")
    assert data.class_names == tuple(names)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no samples"),
        ([("a.cls", b"1")], "a has no image"),
        ([("a.png", b"x")], "a has no .cls label"),
        ([("a.png", b"x"), ("a.cls", b"10")], "label '10'; expected a number below 10"),
        ([("a.png", b"x"), ("a.cls", b"one")], "label 'one'"),
    ],
)
def test_broken_sets(tmp_path: Path, members: list[tuple[str, bytes]], message: str):
    path = write_set(tmp_path / "s", {"train": []}, shards=1)
    with tarfile.open(path / "train" / "0.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    with pytest.raises(FinetuneError, match=message):
        open_set(path, "train")


def test_missing_parts(tmp_path: Path):
    path = write_set(tmp_path / "s", {"test": digits(0, 4)})
    with pytest.raises(FinetuneError, match=r"no split 'train'.*found test"):
        open_set(path, "train")
    with pytest.raises(FinetuneError, match="no such labelled set"):
        open_set(tmp_path / "nowhere", "train")
    tar = path / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(FinetuneError, match=r"0\.tar: not a whole tar"):
        open_set(path, "test")
    tar.unlink()
    with pytest.raises(OSError, match=r"0\.tar"):
        open_set(path, "test")
