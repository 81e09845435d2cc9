"""Finding shards, and the byte ranges of their samples."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from clip_train import TrainError
from clip_train.shards import Shard, expand_braces, find_shards, open_data

from .conftest import SIZES, pair, write_shard


def test_finds_directory_braces_and_glob(data: Path) -> None:
    everything = find_shards(str(data))
    assert [path.name for path in everything] == [f"{i:05}.tar" for i in range(4)]
    assert find_shards(f"{data}/{{00000..00003}}.tar") == everything
    assert find_shards(f"{data}/0000[01].tar") == everything[:2]


def test_skips_what_macos_leaves(tmp_path: Path) -> None:
    for name in ("0.tar", "._0.tar"):
        write_shard(tmp_path / name, {})
    assert find_shards(str(tmp_path)) == [tmp_path / "0.tar"]


def test_braces() -> None:
    assert expand_braces("a{08..11}b{x,y}") == [
        f"a{i}b{c}" for i in ("08", "09", "10", "11") for c in "xy"
    ]
    assert expand_braces("plain{x}") == ["plain{x}"]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"no shards .*clip-data build"):
        find_shards(str(tmp_path))
    with pytest.raises(TrainError, match=r"no file .*00001\.tar"):
        find_shards(f"{tmp_path}/{{00001..00002}}.tar")


def test_counts_and_bytes(data: Path) -> None:
    assert open_data(str(data)).counts == list(SIZES)
    shard = Shard(data / "00001.tar")
    assert shard.image(3) == pair(23)["jpg"]
    assert shard.caption(3) == pair(23)["txt"]
    assert shard.name(3) == f"{data.name}/00001.tar/000010003"


def test_index_is_used_only_if_it_belongs_to_the_tar(tmp_path: Path) -> None:
    tar = tmp_path / "0.tar"
    write_shard(tar, {"a": pair(0), "b": pair(1)})
    scanned = Shard(tar)
    spans = scanned.images.tolist(), scanned.captions.tolist()
    index = {
        "format": 1,
        "tar_bytes": tar.stat().st_size,
        "keys": ["indexed-a", "indexed-b"],
        "members": {"jpg": spans[0], "txt": [spans[1][0], None]},
    }
    (tmp_path / "0.index.json").write_text(json.dumps(index))
    indexed = Shard(tar)
    assert indexed.keys == ["indexed-a", "indexed-b"]
    assert indexed.pairs() == 1
    assert indexed.image(1) == pair(1)["jpg"]
    with pytest.raises(TrainError, match=r"no \.txt member"):
        indexed.caption(1)
    index["tar_bytes"] -= 1
    (tmp_path / "0.index.json").write_text(json.dumps(index))
    assert Shard(tar).keys == ["a", "b"]
    index["tar_bytes"] += 2
    (tmp_path / "0.index.json").write_text(json.dumps(index))
    with pytest.raises(TrainError, match=r"0\.tar: truncated: 10240 of 10241 bytes"):
        Shard(tar)


def test_shards_without_pairs(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"a": {"jpg": b"x", "cls": b"1"}})
    with pytest.raises(TrainError, match="no image-caption pair"):
        open_data(str(tmp_path))


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(TrainError, match=r"0\.tar: not a readable tar"):
        open_data(str(tmp_path))


def test_hash_knows_the_data(tmp_path: Path, data: Path) -> None:
    write_shard(tmp_path / "00000.tar", {"a": pair(0)})
    one = open_data(str(tmp_path)).hash
    assert one == open_data(f"{tmp_path}/*.tar").hash
    assert one != open_data(str(data)).hash


def test_keys_follow_webdataset(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("./x/a.b.JPG", "./x/a.TXT", "x", ".hidden"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert Shard(tmp_path / "0.tar").keys == ["./x/a"]


def test_labels(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"a": {"cls": b"12\n"}, "b": {"cls": b"dog"}, "c": pair(0)})
    shard = Shard(tmp_path / "0.tar")
    assert shard.label(0) == 12
    with pytest.raises(TrainError, match=r"\.cls holds b'dog'; expected an integer"):
        shard.label(1)
    with pytest.raises(TrainError, match=r"no \.cls member"):
        shard.label(2)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of a shard with the same name."""
    for folder, n in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", {f"k{i}": pair(i) for i in range(n)})
    return tmp_path / "a", tmp_path / "b"


def test_several_sources(two: tuple[Path, Path], data: Path) -> None:
    a, b = two
    found = open_data(f"{a}::{b}/*.tar::{data}/{{00000..00001}}.tar")
    assert found.shards == [a / "0.tar", b / "0.tar", data / "00000.tar", data / "00001.tar"]
    assert found.shards == find_shards(f"{a}::{b}::{data}/0000[01].tar")
    assert found.counts == [2, 3, 20, 25]
    assert found.sources == [1, 1, 2]
    assert found.weights is None


def test_hash_of_one_source_is_what_it_was(data: Path) -> None:
    """Fixed for good: runs in progress compare it."""
    rows = [[f"{i:05}.tar", (data / f"{i:05}.tar").stat().st_size, n] for i, n in enumerate(SIZES)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert open_data(str(data)).hash == f"sha256:{digest}"
    assert open_data(f"{data}/0000[01].tar::{data}/0000[23].tar").hash == f"sha256:{digest}"


def test_hash_knows_weights_and_grouping(two: tuple[Path, Path], data: Path) -> None:
    a, b = two
    hashes = {
        open_data(f"{a}::{b}").hash,
        open_data(f"{a}::{b}", "1::1").hash,
        open_data(f"{a}::{b}", "2::1").hash,
        open_data(f"{data}/0000[01].tar::{data}/0000[23].tar", "2::1").hash,
        open_data(f"{data}/0000[012].tar::{data}/0000[3].tar", "2::1").hash,
    }
    assert len(hashes) == 5
    assert open_data(f"{a}::{b}", "2::1") == open_data(f"{a}::{b}", "2.0::1.0")


@pytest.mark.parametrize("weights", ["2", "1::2::3", "x::1", "0::1", "-1::1", "nan::1", "inf::1"])
def test_wrong_weights(two: tuple[Path, Path], weights: str) -> None:
    with pytest.raises(TrainError, match=f"--train-weights is '{weights}'; it must be"):
        open_data(f"{two[0]}::{two[1]}", weights)


def test_a_shard_twice(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = two
    with pytest.raises(TrainError, match=r"names a shard 2 times: .*0\.tar"):
        open_data(f"{a}::{a}/0.tar")
    monkeypatch.chdir(a)
    with pytest.raises(TrainError, match="names a shard 2 times"):
        open_data(f"{a}::.")
    with pytest.raises(TrainError, match="names a shard 2 times"):
        open_data("{0,0}.tar")


def test_empty_source(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="a source is empty"):
        open_data(f"{two[0]}::")
    write_shard(tmp_path / "empty.tar", {})
    with pytest.raises(TrainError, match="the shards are empty"):
        open_data(f"{two[0]}::{tmp_path}/empty.tar")
    (tmp_path / "none").mkdir()
    with pytest.raises(TrainError, match="--val-data: no shards"):
        find_shards(str(tmp_path / "none"), "--val-data")


def test_counting_many_tars_shows_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(101):
        write_shard(tmp_path / f"{number:03}.tar", {})
    write_shard(tmp_path / "000.tar", {"k": {"jpg": b"x", "txt": b"y"}})
    with caplog.at_level("INFO", "clip_train"):
        open_data(f"{tmp_path}/00*.tar")
        assert caplog.messages == []
        open_data(str(tmp_path))
    assert caplog.messages == [
        f"no sizes.json: {n} of 101 shards counted (`clip-data index` does it once for all)"
        for n in (0, 100)
    ]


def test_manifests_of_all_folders(two: tuple[Path, Path]) -> None:
    a, b = two
    assert open_data(f"{a}::{b}").manifest_hash is None
    (a / "manifest.json").write_text('{"shards": [{"name": "0.tar", "bytes": 99999}]}')
    with pytest.raises(TrainError, match=r"0\.tar: truncated: \d+ of 99999 bytes"):
        open_data(str(a))
    (a / "manifest.json").write_text("{}")
    assert open_data(str(a)).manifest_hash == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    (b / "manifest.json").write_text("{ }")
    assert open_data(f"{a}::{b}").manifest_hash == f"sha256:{hashlib.sha256(b'{}{ }').hexdigest()}"
