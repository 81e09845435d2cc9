"""CLIP_benchmark's layout, as others write it, and every way it can be broken."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from clip_models import ModelError
from clip_probe import ProbeError
from clip_probe.datasets import open_split

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
