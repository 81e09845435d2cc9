"""Finding shards, and the byte ranges of their samples."""

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
    assert shard.name(3) == "00001.tar/000010003"


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
