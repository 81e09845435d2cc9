"""Subsets are exact, nested and reproducible; what stays is as it was."""

import hashlib
import json
import os
import shutil
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import clip_data.subsets
import pyarrow.parquet as pq
import pytest
import webdataset
from clip_data import DataError, verify
from clip_data.selection import write_selection
from clip_data.sidecars import read_keys
from clip_data.subsets import subset
from upath import UPath

from .conftest import contents
from .handmade import members, write_shards

ROWS = (30, 7, 25, 0, 40)  # 27 + 7 + 23 + 0 + 36 good ones
GOOD = 93


@pytest.mark.parametrize("kind", ["ours", "img2dataset", "plain"])
@pytest.mark.parametrize("by", ["sample", "shard"])
def test_subsets_are_exact_and_nested(tmp_path: Path, kind: str, by: str) -> None:
    source = write_shards(tmp_path / "in", ROWS, kind)
    whole = members(source)
    for seed in (0, 7):
        found: list[set[str]] = []
        for samples in (1, 9, 31, 57, 92, 93):
            out = UPath(tmp_path / f"{seed}-{samples}")
            selected = subset(source, out, samples=samples, by=by, seed=seed)
            kept = members(out)
            assert len(kept) == selected.samples == samples
            assert selected.dropped == GOOD - samples
            assert kept == {key: whole[key] for key in whole if key in kept}
            assert list(kept) == [key for key in whole if key in kept]
            assert sum(json.loads((out / "sizes.json").read_text()).values()) == samples
            assert verify(out).faults == {}
            found.append(set(kept))
        assert all(smaller < larger for smaller, larger in pairwise(found))
    assert members(tmp_path / "0-31").keys() != members(tmp_path / "7-31").keys()


def test_least_hashes(tmp_path: Path) -> None:
    """The definition, in full: it must never change, or yesterday's subsets are lost."""
    source = write_shards(tmp_path / "in", ROWS)

    def rank(tar: str, key: str) -> int:
        digest = hashlib.blake2b(f"5 {tar} {key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    ranks = {key: rank(f"{key[:5]}.tar", key) for key in members(source)}
    subset(source, UPath(tmp_path / "out"), samples=20, seed=5)
    assert set(members(tmp_path / "out")) == set(sorted(ranks, key=lambda key: ranks[key])[:20])


def test_a_subset_of_a_subset(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", ROWS)
    small, large, both = (UPath(tmp_path / name) for name in ("small", "large", "both"))
    subset(source, small, samples=11)
    subset(source, large, samples=60)
    subset(large, both, samples=11)
    assert members(both) == members(small)


def test_equal_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = clip_data.subsets.rank_samples
    monkeypatch.setattr("clip_data.subsets.rank_samples", lambda *args: rank(*args) % 3 << 60)
    source = write_shards(tmp_path / "in", ROWS)
    found: list[set[str]] = []
    for samples in range(1, GOOD + 1, 4):
        subset(source, UPath(tmp_path / str(samples)), samples=samples)
        found.append(set(members(tmp_path / str(samples))))
        assert len(found[-1]) == samples
    assert all(smaller < larger for smaller, larger in pairwise(found))


def test_keys_that_every_shard_has(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", (9,), "plain")
    for number in range(1, 6):
        shutil.copy(source / "00000.tar", source / f"{number:05d}.tar")
    found: list[set[tuple[str, str]]] = []
    for samples in (3, 10, 20, 48):
        out = UPath(tmp_path / str(samples))
        assert subset(source, out, samples=samples).samples == samples
        found.append({(tar.name, key) for tar in out.glob("*.tar") for key in read_keys(tar)})
        assert len(found[-1]) == samples
    assert all(smaller < larger for smaller, larger in pairwise(found))
    assert len({key for _, key in found[1]}) > 2  # not the same rows of every shard


def test_whole_shards_are_linked(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "in", ROWS), tmp_path / "out"
    selected = subset(source, UPath(out), samples=GOOD - 10, by="shard")
    assert (selected.linked, selected.rewritten) == (selected.shards - 1, 1)
    linked = [tar for tar in out.glob("*.tar") if tar.samefile(source / tar.name)]
    assert len(linked) == selected.linked
    for tar in linked:
        for sidecar in (tar.with_suffix(".index.json"), tar.with_suffix(".parquet")):
            assert sidecar.samefile(source / sidecar.name)
    assert subset(source, UPath(tmp_path / "all"), samples=GOOD).linked == 4  # the fifth is empty


def test_copied_where_no_link_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "in", ROWS, "img2dataset")
    subset(source, UPath(tmp_path / "linked"), samples=GOOD)

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    subset(source, UPath(tmp_path / "copied"), samples=GOOD)
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
    assert not (tmp_path / "copied/00000.tar").samefile(source / "00000.tar")


def test_a_link_to_a_shard_is_followed(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", ROWS, "plain")
    (tmp_path / "links").mkdir()
    for tar in source.glob("*.tar"):
        (tmp_path / "links" / tar.name).symlink_to(f"../in/{tar.name}")
    subset(UPath(tmp_path / "links"), UPath(tmp_path / "out"), samples=GOOD)
    assert not (tmp_path / "out/00000.tar").is_symlink()
    assert (tmp_path / "out/00000.tar").samefile(source / "00000.tar")


def test_sidecars_of_a_shard_written_anew(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "in", ROWS), tmp_path / "out"
    subset(source, UPath(out), samples=50)
    for tar in sorted(out.glob("*.tar")):
        index = json.loads(tar.with_suffix(".index.json").read_text())
        kept = members(tmp_path / "out")
        for row, key in enumerate(index["keys"]):
            for extension, column in index["members"].items():
                offset, size = column[row]
                assert (f"{key}.{extension}", tar.read_bytes()[offset : offset + size]) in kept[key]
        before = pq.read_table(source / tar.with_suffix(".parquet").name)
        after = pq.read_table(tar.with_suffix(".parquet"))
        assert after.schema.equals(before.schema, check_metadata=True)
        stays = [row for row, key in enumerate(before["key"].to_pylist()) if key in index["keys"]]
        assert str(after.to_pylist()) == str(before.take(stays).to_pylist())  # nan is not nan
        stats = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text())
        assert stats["samples"] == len(index["keys"]) == len(stays)
        assert stats["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()


def test_manifest(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "in", ROWS), tmp_path / "out"
    subset(source, UPath(out), samples=50, seed=2)
    manifest = json.loads((out / "manifest.json").read_text())
    before = (source / "manifest.json").read_bytes()
    assert manifest["source_manifest"] == hashlib.sha256(before).hexdigest()
    assert manifest["arguments"] == {
        "command": "subset",
        "samples": 50,
        "by": "sample",
        "seed": 2,
    }
    assert (manifest["samples"], manifest["dropped"]) == (50, GOOD - 50)
    assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]} == {
        tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in out.glob("*.tar")
    }


@pytest.mark.parametrize("kind", ["ours", "img2dataset", "plain"])
@pytest.mark.parametrize("by", ["sample", "shard"])
def test_continues_and_then_does_nothing(tmp_path: Path, kind: str, by: str) -> None:
    source, out = write_shards(tmp_path / "in", ROWS, kind), tmp_path / "out"
    written = subset(source, UPath(out), samples=80, by=by)
    whole = contents(out)
    shutil.copytree(out, tmp_path / "killed")
    marker = whole["manifest.json"].decode()
    for name in whole:
        killed = UPath(tmp_path / "killed")
        (killed / name).unlink()
        (killed / "manifest.json").unlink(missing_ok=True)
        (killed / "manifest.json.partial").write_text(marker)
        (killed / f"{name}.partial").write_bytes(b"half")
        if name == "manifest.json":
            (killed / f"{name}.partial").write_text(marker)
        assert subset(source, killed, samples=80, by=by) == replace(written, output=str(killed))
        assert contents(tmp_path / "killed") == whole
    (out / "00004.tar").unlink()  # lost from a selection that was complete
    subset(source, UPath(out), samples=80, by=by)
    assert contents(out) == whole
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    os.utime(source / "00000.tar")
    assert subset(source, UPath(out), samples=80, by=by) == written
    linked = {path for path in out.iterdir() if (source / path.name).exists()}
    after = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    assert {p: t for p, t in after.items() if p not in linked} == {
        p: t for p, t in before.items() if p not in linked
    }


@pytest.mark.slow
def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", ROWS)
    for workers in (1, 2):
        subset(source, UPath(tmp_path / str(workers)), samples=60, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_other_file_systems(tmp_path: Path) -> None:
    source, out = UPath("memory://subset-in"), UPath("memory://subset-out")
    write_shards(source, ROWS)
    local = write_shards(tmp_path / "in", ROWS)
    for by, samples in (("sample", 40), ("shard", 50)):
        subset(local, UPath(tmp_path / by), samples=samples, by=by)
        selected = subset(source, out / by, samples=samples, by=by)
        assert subset(source, out / by, samples=samples, by=by) == selected
        remote = {path.name: path.read_bytes() for path in (out / by).iterdir()}
        manifest = json.loads(remote.pop("manifest.json"))
        expected = contents(tmp_path / by)
        assert manifest == {
            **json.loads(expected.pop("manifest.json")),
            "source": str(source),
        }
        assert remote == expected


# Sets ---------------------------------------------------------------------------------------------


def write_split(folder: Path) -> UPath:
    source = write_shards(folder / "test", (10, 10, 10), "plain")
    for number in range(3):
        (source / f"{number:05d}.tar").rename(source / f"{number}.tar")
    (source / "nshards.txt").write_text("3\n")
    (folder / "classnames.txt").write_text("cat\n\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    return source


def test_a_split_stays_one(tmp_path: Path) -> None:
    source, out = write_split(tmp_path / "set"), tmp_path / "out/test"
    subset(source, UPath(out), samples=13, by="shard")
    assert (out / "nshards.txt").read_text() == "2\n"
    assert sorted(tar.name for tar in out.glob("*.tar")) == ["0.tar", "1.tar"]
    assert (tmp_path / "out/classnames.txt").read_text() == "cat\n\n"
    assert (tmp_path / "out/zeroshot_classification_templates.txt").read_text() == "a {c}\n"
    assert verify(UPath(tmp_path / "out")).faults == {"no label": 13}  # as in the source
    whole = contents(tmp_path / "out")
    subset(source, UPath(out), samples=13, by="shard")
    assert contents(tmp_path / "out") == whole
    urls = [str(out / f"{number}.tar") for number in range(2)]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))) == 13


def test_a_split_goes_into_no_other_set(tmp_path: Path) -> None:
    source, out = write_split(tmp_path / "set"), tmp_path / "out"
    out.mkdir()
    (out / "classnames.txt").write_text("dog\n")
    with pytest.raises(DataError, match=r"classnames\.txt: differs from the source's"):
        subset(source, UPath(out / "test"), samples=5)
    assert contents(out) == {"classnames.txt": b"dog\n"}


# Refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "in", ROWS), UPath(tmp_path / "out")
    for by in ("sample", "shard"):
        with pytest.raises(DataError, match="93 samples, 94 asked for"):
            subset(source, out, samples=94, by=by)
    with pytest.raises(DataError, match="expected at least one"):
        subset(source, out, samples=0)
    with pytest.raises(DataError, match="expected 'sample' or 'shard'"):
        subset(source, out, samples=1, by="row")
    with pytest.raises(DataError, match="the source itself"):
        subset(source, source / ".." / "in", samples=1)
    with pytest.raises(DataError, match="no shards"):
        subset(UPath(tmp_path), out, samples=1)
    with pytest.raises(DataError, match="no sample stays"):
        write_selection(source, out, [(source / "00000.tar", frozenset())], arguments={})
    assert not out.exists()


@pytest.mark.parametrize("kind", ["ours", "img2dataset", "plain"])
def test_another_selection_is_refused(tmp_path: Path, kind: str) -> None:
    source, out = write_shards(tmp_path / "in", ROWS, kind), UPath(tmp_path / "out")
    other = write_shards(tmp_path / "other", (9, 9, 9, 9), kind)
    subset(source, out, samples=20)
    before = contents(tmp_path / "out")
    for options in ({"samples": 21}, {"samples": 20, "seed": 1}, {"samples": 20, "by": "shard"}):
        with pytest.raises(DataError, match="of another source, or of another command"):
            subset(source, out, **options)
    with pytest.raises(DataError, match="of another source"):
        subset(other, out, samples=20)
    assert contents(tmp_path / "out") == before
    before = contents(tmp_path / "other")
    with pytest.raises(DataError, match="of another source, or of another command"):
        subset(source, other, samples=20)
    assert contents(tmp_path / "other") == before


def test_damaged_shards(tmp_path: Path) -> None:
    out = UPath(tmp_path / "out")
    plain = write_shards(tmp_path / "plain", ROWS, "plain")
    tar = (plain / "00000.tar").read_bytes()
    (plain / "00000.tar").write_bytes(tar[: len(tar) // 2])
    with pytest.raises(DataError, match=r"00000\.tar: damaged"):
        subset(plain, out, samples=5)
    ours = write_shards(tmp_path / "ours", ROWS)
    (ours / "00000.tar").write_bytes(tar + bytes(512))
    with pytest.raises(DataError, match=r"00000\.tar: \d+ bytes, its sidecars say \d+"):
        subset(ours, out, samples=GOOD)
    theirs = write_shards(tmp_path / "img2dataset", ROWS, "img2dataset")
    shutil.copy(theirs / "00001.tar", theirs / "00000.tar")
    for samples in (GOOD, GOOD - 20):
        with pytest.raises(DataError, match="list other keys than it holds"):
            subset(theirs, UPath(tmp_path / f"out-{samples}"), samples=samples)
    (theirs / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"00000\.parquet: damaged"):
        subset(theirs, UPath(tmp_path / "parquet"), samples=5)


def test_a_key_twice_and_a_name_too_long(tmp_path: Path) -> None:
    for name, keys in {"twice": ["a", "b", "a"], "long": ["a", "b" * 150]}.items():
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "00000.tar", "w") as tar:
            for key in keys:
                tar.addfile(tarfile.TarInfo(f"{key}.txt"))
    with pytest.raises(DataError, match="a key is there twice"):
        subset(UPath(tmp_path / "twice"), UPath(tmp_path / "out"), samples=1)
    tar = UPath(tmp_path / "long/00000.tar")
    with pytest.raises(DataError, match="name is too long"):
        write_selection(
            tar.parent, UPath(tmp_path / "out"), [(tar, frozenset({"b" * 150}))], arguments={}
        )
    assert not list((tmp_path / "out").glob("*.tar*"))
