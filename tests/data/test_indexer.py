"""Indexes made later are those that a build writes."""

from pathlib import Path

import pytest
from clip_data import DataError, build, index_shards, verify

from .conftest import contents


def bare(captioned: Path, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """Shards as another tool leaves them, and what a build writes beside them."""
    shards = tmp_path / "shards"
    build(captioned, shards, samples_per_shard=4)
    written = contents(shards)
    for file in written:
        if not file.endswith(".tar"):
            (shards / file).unlink()
    return shards, written


def test_equals_a_build(captioned: Path, tmp_path: Path) -> None:
    shards, written = bare(captioned, tmp_path)
    (shards / "._00000.tar").write_bytes(b"macOS")
    done = index_shards(shards)
    assert (done.shards, done.samples, done.written) == (3, 10, 3)
    found = contents(shards)
    assert {name for name in found if name.endswith(".json")} == {
        *(f"0000{n}.index.json" for n in range(3)),
        "sizes.json",
    }
    assert all(found[name] == written[name] for name in found if not name.startswith("._"))
    (shards / "._00000.tar").unlink()
    assert verify(shards).faults == {}
    assert index_shards(shards).written == 0
    (shards / "00001.index.json").unlink()
    assert index_shards(shards).written == 1


def test_damaged_tars_are_named(captioned: Path, tmp_path: Path) -> None:
    shards, _ = bare(captioned, tmp_path)
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[:1500])
    with pytest.raises(DataError, match=r"1 tars have no index, the first .*00001.tar: damaged"):
        index_shards(shards)
    assert {path.name for path in shards.glob("*.json")} == {"00000.index.json", "00002.index.json"}
    (shards / "00001.tar").write_bytes(whole)
    assert index_shards(shards).written == 1
