"""CLIP_benchmark's layout, as others write it, and every way it can be broken."""

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clip_models import ModelError
from clip_probe import ProbeError
from clip_probe.datasets import open_split
from clip_probe.extract import title_of
from clip_probe.hub import hub_name

WriteSet = Callable[..., Path]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def one(tmp_path: Path, write_set: WriteSet) -> Path:
    """Two images, one shard, three classes of which one has no name."""
    rows = [(b"first", 2), (b"second", 1)]
    return write_set(tmp_path / "one", {"test": rows}, ["cat", "", "dog"], shards=1)


def test_samples_in_order_with_an_empty_class_name(one: Path) -> None:
    split = open_split(one, "test")
    assert split.class_names == ("cat", "", "dog")
    assert split.labels == [2, 1]
    assert [split.read(i) for i in range(2)] == [b"first", b"second"]


@pytest.mark.parametrize("extension", ["webp", "png", "jpg", "jpeg", "JPG"])
def test_image_extensions(tmp_path: Path, write_set: WriteSet, extension: str) -> None:
    path = write_set(tmp_path / "set", {"test": [(b"x", 0)]}, ["a"], extension=extension, shards=1)
    assert open_split(path, "test").read(0) == b"x"


def test_other_members_folders_and_no_image_order(one: Path) -> None:
    members = [("./", b""), ("in/s1.cls", b"1\n"), ("in/s1.json", b"{}"), ("in/s1.jpg", b"image")]
    write_tar(one / "test" / "0.tar", members[1:])
    split = open_split(one, "test")
    assert (split.samples[0].key, split.labels, split.read(0)) == ("in/s1", [1], b"image")


def test_digest_identifies_the_labels(one: Path) -> None:
    before = open_split(one, "test").digest
    assert open_split(one, "test").digest == before
    write_tar(one / "test" / "0.tar", [("s0.png", b"first"), ("s0.cls", b"0")])
    assert open_split(one, "test").digest != before


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("s0.png", b"x"), ("s0.cls", b"3")], "label 3 is beyond the 3 class names"),
        ([("s0.png", b"x"), ("s0.cls", b"-1")], "expected a class number"),
        ([("s0.png", b"x"), ("s0.cls", b"cat")], "expected a class number in .cls, found b'cat'"),
        ([("s0.png", b"x"), ("s0.txt", b"a cat")], r"has no .cls: .* found .png, .txt"),
        ([("s0.cls", b"0"), ("s0.npy", b"x")], r"expected one image \(webp, png, jpg, jpeg\)"),
        ([("s0.cls", b"0"), ("s0.png", b"x"), ("s0.jpg", b"x")], "expected one image"),
        ([], "holds no samples"),
    ],
)
def test_bad_samples(one: Path, members: list[tuple[str, bytes]], says: str) -> None:
    write_tar(one / "test" / "0.tar", members)
    with pytest.raises(ProbeError, match=says):
        open_split(one, "test")


@pytest.mark.parametrize("left", [0, 100, 512, 700, 1024, 2560, 3072])
def test_truncated_shards(one: Path, left: int) -> None:
    shard = one / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(ProbeError, match=r"0\.tar is truncated or no tar|has no .cls"):
        open_split(one, "test")


def test_missing_parts(one: Path) -> None:
    with pytest.raises(ProbeError, match=r"no split 'val' in .*: found test"):
        open_split(one, "val")
    with pytest.raises(ProbeError, match="no labelled set at"):
        open_split(one / "nowhere", "test")
    (one / "test" / "nshards.txt").write_text("2\n")
    with pytest.raises(ProbeError, match=r"1\.tar is missing: .* promises 2 shards"):
        open_split(one, "test")
    (one / "test" / "nshards.txt").write_text("two")
    with pytest.raises(ProbeError, match="expected the number of shards, found 'two'"):
        open_split(one, "test")
    (one / "classnames.txt").unlink()
    with pytest.raises(ModelError, match=r"classnames\.txt"):
        open_split(one, "test")


def test_digest_identifies_the_pixels(one: Path) -> None:
    before = open_split(one, "test")
    (one / "classnames.txt").write_text("cat\n\nbird\n")
    renamed = open_split(one, "test")
    assert renamed.content == before.content
    assert renamed.digest != before.digest
    shard = one / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"first", b"third"))
    assert open_split(one, "test").content != before.content


def test_other_class_names(one: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Katze\nVogel\nHund\n")
    assert open_split(one, "test", class_names=str(names)).class_names[2] == "Hund"
    assert len(open_split(one, "test", class_names="imagenet").class_names) == 1000
    names.write_text("Katze\nVogel\n")
    with pytest.raises(ProbeError, match="label 2 is beyond the 2 class names"):
        open_split(one, "test", class_names=str(names))


def test_many_labels(properties: Path) -> None:
    split = open_split(properties, "test", multilabel=True)
    assert split.multilabel
    assert {sample.labels for sample in split.samples} >= {(0, 3), (1, 2), (0,)}  # 0, 7, 6
    with pytest.raises(ProbeError, match="is a multi-label set"):
        open_split(properties, "test")


@pytest.mark.parametrize("labels", [np.ones(4), np.array([0, 1, 2, 0, 0]), np.ones((1, 5))])
def test_labels_that_are_not_zeros_and_ones(
    labels: np.ndarray, tmp_path: Path, write_set: WriteSet
) -> None:
    path = write_set(tmp_path / "set", {"test": [(b"x", labels)]}, list("abcde"), shards=1)
    (path / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(ProbeError, match=r"expected a 0 or 1 in \.npy for each of 5 class names"):
        open_split(path, "test", multilabel=True)


class Bomb:
    """Whoever unpickles it fails the test."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("unpickled",)


def test_labels_are_never_unpickled(one: Path) -> None:
    (one / "dataset_type.txt").write_text("multilabel")
    objects = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        objects, {"descr": "|O", "fortran_order": False, "shape": (3,)}
    )
    for data in (pickle.dumps(Bomb()), objects.getvalue() + pickle.dumps(Bomb()), b"", b"PK\3\4"):
        write_tar(one / "test" / "0.tar", [("s0.png", b"x"), ("s0.npy", data)])
        with pytest.raises(ProbeError, match=r"'s0' of .*: expected a plain array in \.npy"):
            open_split(one, "test", multilabel=True)


def test_sets_of_another_type(one: Path) -> None:
    (one / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(ProbeError, match="`clip-retrieval eval`"):
        open_split(one, "test")
    (one / "dataset_type.txt").write_text("regression\n")
    with pytest.raises(ProbeError, match=r"expected classification, .* found 'regression'"):
        open_split(one, "test")


def test_names_on_the_hub() -> None:
    assert hub_name("wds/vtab/dtd") == "clip-benchmark/wds_vtab-dtd"
    assert hub_name("hf-hub:me/my_set") == "me/my_set"
    for path in ("set", "/sets/wds", "me/my_set", "hf-hub:me"):
        assert hub_name(path) is None


def test_sets_in_the_cache_of_the_hub(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / "datasets--clip-benchmark--wds_vtab-one"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    snapshot = home / "snapshots" / commit
    shutil.copytree(one, snapshot)
    split = open_split(Path("wds/vtab/one"), "test")
    assert (split.source, split.read(0)) == ("wds/vtab/one", b"first")
    assert title_of(split) == "one/test"
    assert open_split(Path("hf-hub:clip-benchmark/wds_vtab-one"), "test").digest == split.digest
    (snapshot / "test/0.tar").unlink()
    with pytest.raises(ProbeError, match=r"0\.tar is missing"):
        open_split(Path("wds/vtab/one"), "test")
    with pytest.raises(
        ProbeError, match="the hub's set clip-benchmark/wds_none cannot be had"
    ) as e:
        open_split(Path("wds/none"), "test")
    assert "\n" not in str(e.value)
