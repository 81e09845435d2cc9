"""Verification finds each planted fault, and none in what is sound."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from clip_data import DataError, build, verify

from .conftest import picture, write_captioned, write_classes


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar as other tools write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def edit_json(path: Path, **fields: object) -> None:
    """Change fields of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path: Path, size: int) -> None:
    """Shorten a file."""
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(bytes(data))


PLANTED: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "truncated inside a member": (
        lambda out: cut(out / "00000.tar", 600),
        {"tar truncated or damaged"},
    ),
    "truncated between members": (
        lambda out: cut(out / "00000.tar", 1024),
        {"tar truncated or damaged", "no caption"},
    ),
    "half of the end marker": (  # after two samples of three members, each a header and a block
        lambda out: cut(out / "00000.tar", 6 * 1024 + 512),
        {"tar truncated or damaged"},
    ),
    "damaged header": (lambda out: flip(out / "00000.tar", 1030), {"tar truncated or damaged"}),
    "damaged image": (lambda out: flip(out / "00000.tar", 560), {"undecodable image"}),
    "hash": (lambda out: flip(out / "00001.tar", -1), {"sha256 differs"}),
    "sizes": (lambda out: edit_json(out / "sizes.json", **{"00000.tar": 3}), {"wrong count"}),
    "index": (lambda out: edit_json(out / "00000.index.json", keys=[]), {"index differs from tar"}),
    "no index": (lambda out: (out / "00000.index.json").unlink(), {"missing index"}),
    "no shard": (lambda out: (out / "00001.tar").unlink(), {"missing shard"}),
    "another shard": (
        lambda out: (out / "00009.tar").write_bytes((out / "00000.tar").read_bytes()),
        {"shard not in manifest", "duplicate key"},
    ),
    "unfinished": (
        lambda out: (out / "manifest.json").rename(out / "manifest.json.partial"),
        {"build not finished"},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_in_built_shards(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    build(write_captioned(tmp_path / "in", 4), out, samples_per_shard=2)
    assert verify(out).faults == {}
    plant, expected = PLANTED[name]
    plant(out)
    report = verify(out)
    assert expected <= set(report.faults)
    assert {fault.fault for fault in report.first} == set(report.faults)


@pytest.mark.parametrize(
    ("members", "fault", "key"),
    [
        ({"a.png": picture(0), "a.txt": b" \n"}, "empty caption", "a"),
        ({"a.png": picture(0), "a.txt": b"caf\xe9"}, "caption is not UTF-8", "a"),
        ({"a.png": picture(0)[:40], "a.txt": b"a"}, "undecodable image", "a"),
        ({"a.txt": b"a"}, "no image", "a"),
        ({"a.png": picture(0)}, "no caption", "a"),
        ({"a.png": picture(0), "a.cls": b"one"}, "label out of range", "a"),
        ({"a.png": picture(0), "a.cls": b"9" * 5000}, "label out of range", "a"),
    ],
)
def test_fault_in_shards_of_other_tools(
    tmp_path: Path, members: dict[str, bytes], fault: str, key: str
) -> None:
    write_tar(tmp_path / "00000.tar", members)
    report = verify(tmp_path)
    assert report.faults == {fault: 1}
    assert report.first[0].key == key


def test_duplicate_keys(tmp_path: Path) -> None:
    sample = {"k.png": picture(0), "k.txt": b"a"}
    other = {"x.png": picture(0), "x.txt": b"a"}
    write_tar(tmp_path / "0.tar", sample | other)
    write_tar(tmp_path / "1.tar", sample)
    (fault,) = verify(tmp_path, workers=2).first
    assert (fault.fault, fault.key, fault.detail) == ("duplicate key", "k", "also in 0.tar")


def test_labelled_set(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build(write_classes(tmp_path / "in", {"a": 1, "b": 1}), out, split="test")
    write_tar(out / "train/0.tar", {"s0.png": picture(0), "s0.cls": b"2"})
    write_tar(out / "train/1.tar", {"s1.png": picture(0), "s1.txt": b"no class"})
    (out / "train/nshards.txt").write_text("3")
    assert verify(out).faults == {"label out of range": 1, "missing shard": 1, "no label": 1}


def test_webdataset_writer_output_is_accepted(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=2, verbose=0) as writer:
        for n in range(5):
            writer.write({"__key__": f"{n:09d}", "jpg": picture(n, "JPEG"), "txt": "a caption"})
    report = verify(tmp_path)
    assert (report.shards, report.samples, report.faults) == (3, 5, {})


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards"):
        verify(tmp_path)


def test_damaged_manifest(tmp_path: Path) -> None:
    build(write_captioned(tmp_path / "in", 1), tmp_path / "out")
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not readable"):
        verify(tmp_path / "out")
