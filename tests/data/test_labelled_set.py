"""Labelled and retrieval sets in CLIP_benchmark's layout."""

import json
from pathlib import Path

import pytest
import webdataset
from clip_data import DataError, build, verify

from .conftest import write_captioned, write_classes


def test_splits_of_a_labelled_set(tmp_path: Path) -> None:
    out = tmp_path / "set"
    train = write_classes(tmp_path / "train", {"dog": 2, "cat": 3})
    test = write_classes(tmp_path / "test", {"dog": 1})
    build(train, out, split="train", samples_per_shard=2)
    summary = build(test, out, split="test")
    assert summary.output == str(out / "test")
    assert (out / "classnames.txt").read_text() == "cat\ndog\n"
    assert (out / "zeroshot_classification_templates.txt").read_text() == "a photo of a {c}.\n"
    assert not (out / "dataset_type.txt").exists()
    assert (out / "train/nshards.txt").read_text() == "3\n"
    tars = [str(out / f"train/{n}.tar") for n in range(3)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"s{n:07d}" for n in range(5)]
    assert [sample["cls"] for sample in samples] == [0, 0, 0, 1, 1]
    (sample,) = webdataset.WebDataset(str(out / "test/0.tar"), shardshuffle=False).decode()
    assert sample["cls"] == 1  # dog, though the split has no cat
    assert json.loads((out / "test/sizes.json").read_text()) == {"0.tar": 1}
    report = verify(out)
    assert (report.shards, report.samples, report.faults) == (4, 6, {})


def test_retrieval_set(tmp_path: Path) -> None:
    source = write_captioned(tmp_path / "in", 2)
    (source / "000.txt").write_text("first\n\nsecond\n")
    build(source, tmp_path / "set", split="test")
    assert (tmp_path / "set/dataset_type.txt").read_text() == "retrieval\n"
    assert not (tmp_path / "set/classnames.txt").exists()
    tar = str(tmp_path / "set/test/0.tar")
    captions = [s["txt"] for s in webdataset.WebDataset(tar, shardshuffle=False).decode()]
    assert captions == ["first\nsecond", "picture 1"]
    with pytest.raises(DataError, match=r"dataset_type\.txt: differs"):
        build(write_classes(tmp_path / "cls", {"a": 1}), tmp_path / "set", split="train")


def test_class_order_and_templates_from_files(tmp_path: Path) -> None:
    source = write_classes(tmp_path / "in", {"dog": 1, "cat": 1})
    (tmp_path / "names.txt").write_text("dog\n\ncat\n")  # the empty name is a class
    (tmp_path / "templates.txt").write_text("a {c}\nthe {c}\n")
    files = {"classnames": tmp_path / "names.txt", "templates": tmp_path / "templates.txt"}
    build(source, tmp_path / "set", split="test", **files)
    assert (tmp_path / "set/classnames.txt").read_text() == "dog\n\ncat\n"
    templates = tmp_path / "set/zeroshot_classification_templates.txt"
    assert templates.read_text() == "a {c}\nthe {c}\n"
    tar = str(tmp_path / "set/test/0.tar")
    labels = [s["cls"] for s in webdataset.WebDataset(tar, shardshuffle=False).decode()]
    assert labels == [2, 0]  # cat, dog


def test_labels_that_are_no_class(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build(write_classes(tmp_path / "train", {"cat": 1}), out, split="train")
    test = write_classes(tmp_path / "test", {"cat": 9, "yak": 1})
    summary = build(test, out, split="test")
    assert summary.reasons == {"label not in classnames": 1}
    assert (out / "classnames.txt").read_text() == "cat\n"


def test_splits_must_agree(tmp_path: Path) -> None:
    out = tmp_path / "set"
    source = write_classes(tmp_path / "in", {"cat": 1, "dog": 1})
    build(source, out, split="train")
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    (tmp_path / "templates.txt").write_text("the {c}\n")
    with pytest.raises(DataError, match=r"classnames\.txt: differs"):
        build(source, out, split="test", classnames=tmp_path / "names.txt")
    with pytest.raises(DataError, match=r"templates\.txt: differs"):
        build(source, out, split="test", templates=tmp_path / "templates.txt")
    assert not (out / "test/0.tar").exists()


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("classnames", "cat\ncat\n", "'cat' is there 2 times"),
        ("classnames", "", "empty"),
        ("templates", "a photo\n", "has no {c}"),
    ],
)
def test_bad_lists(tmp_path: Path, option: str, text: str, message: str) -> None:
    source = write_classes(tmp_path / "in", {"cat": 1})
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        build(source, tmp_path / "out", **{option: tmp_path / "list.txt"})  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["", "..", "a/b", "/tmp/x"])
def test_split_is_the_name_of_a_folder(captioned: Path, tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="expected the name of a folder"):
        build(captioned, tmp_path / "set", split=split)


def test_class_names_need_labels(captioned: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        build(captioned, tmp_path / "out", classnames=tmp_path / "names.txt")
