"""Shards are a function of source and arguments, whatever happens on the way."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset
from clip_data import DataError, build, verify
from PIL import Image

from .conftest import Clip, contents, picture, write_captioned


@pytest.mark.parametrize("seed", [None, 3])
def test_bytes_do_not_depend_on_workers_or_runs(captioned: Path, tmp_path: Path, seed: int) -> None:
    for name, workers in {"one": 1, "two": 2, "again": 2}.items():
        build(captioned, tmp_path / name, workers=workers, samples_per_shard=3, shuffle_seed=seed)
    one = contents(tmp_path / "one")
    assert len([name for name in one if name.endswith(".tar")]) == 4
    assert one == contents(tmp_path / "two") == contents(tmp_path / "again")


def test_webdataset_reads_the_shards(captioned: Path, tmp_path: Path) -> None:
    build(captioned, tmp_path / "out", samples_per_shard=6)
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [
        *(f"00000000{n}" for n in range(6)),
        *(f"00001000{n}" for n in range(4)),
    ]
    for number, sample in enumerate(samples):
        assert sample["txt"] == f"picture {number}"
        assert sample["png"][0, 0].tolist() == [number, number * 7, 50]
        assert sample["json"]["image"] == f"{number:03d}.png"


def test_index_points_at_the_bytes(captioned: Path, tmp_path: Path) -> None:
    (captioned / "004.png").write_bytes(picture(4, "JPEG"))
    build(captioned, tmp_path / "out")
    tar = (tmp_path / "out/00000.tar").read_bytes()
    index = json.loads((tmp_path / "out/00000.index.json").read_text())
    assert (index["format"], index["tar_bytes"]) == (1, len(tar))
    assert index["keys"] == [f"00000000{n}" for n in range(10)]
    for number in range(10):
        spans = {extension: column[number] for extension, column in index["members"].items()}
        kind = "jpg" if number == 4 else "png"
        assert spans["jpg" if kind == "png" else "png"] is None
        offset, size = spans[kind]
        assert tar[offset : offset + size] == (captioned / f"{number:03d}.png").read_bytes()
        offset, size = spans["txt"]
        assert tar[offset : offset + size] == f"picture {number}".encode()


def test_shuffle_keeps_every_row_once(captioned: Path, tmp_path: Path) -> None:
    orders: list[list[str]] = []
    for seed in (None, 1, 2):
        out = tmp_path / f"out-{seed}"
        build(captioned, out, shuffle_seed=seed)
        samples = webdataset.WebDataset(str(out / "00000.tar"), shardshuffle=False)
        orders.append([sample["txt"].decode() for sample in samples])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]


def test_sizes_and_manifest(captioned: Path, tmp_path: Path) -> None:
    summary = build(captioned, tmp_path / "out", samples_per_shard=6)
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"00000.tar": 6, "00001.tar": 4}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["samples"], manifest["failed"]) == (10, 0)
    assert manifest["bytes"] == sum(shard["bytes"] for shard in manifest["shards"])
    assert manifest["bytes"] == summary.bytes
    assert manifest["arguments"]["samples_per_shard"] == 6


def test_keys_have_room_for_large_shards(captioned: Path, tmp_path: Path) -> None:
    build(captioned, tmp_path / "out", samples_per_shard=100_000)
    index = json.loads((tmp_path / "out/00000.index.json").read_text())
    assert index["keys"][9] == "0000000009"


def test_another_build_into_the_same_output_is_refused(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(captioned, out)
    before = contents(out)
    other = write_captioned(tmp_path / "other", 9)
    with pytest.raises(DataError, match="built from another source or with other arguments"):
        build(other, out)
    with pytest.raises(DataError, match="built from another source or with other arguments"):
        build(captioned, out, shuffle_seed=1)
    (captioned / "003.txt").write_text("another caption")
    with pytest.raises(DataError, match="built from another source or with other arguments"):
        build(captioned, out)
    assert contents(out) == before


def test_shards_of_another_tool_are_not_overwritten(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"00000\.tar: not of this build"):
        build(captioned, out)
    assert contents(out) == {"00000.tar": b"precious"}


def test_a_lost_shard_is_built_again(captioned: Path, tmp_path: Path) -> None:
    build(captioned, tmp_path / "out", samples_per_shard=3)
    before = contents(tmp_path / "out")
    (tmp_path / "out/00002.tar").unlink()
    build(captioned, tmp_path / "out", samples_per_shard=3)
    assert contents(tmp_path / "out") == before


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, which takes a moment to decode: 48 pictures for 12 shards."""
    folder = tmp_path_factory.mktemp("slow") / "in"
    folder.mkdir()
    noise = random.Random(0)
    for number in range(48):
        image = Image.frombytes("RGB", (300, 300), noise.randbytes(300 * 300 * 3))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
        (folder / f"{number}.txt").write_text(f"noise {number}")
    return folder


def test_killed_builds_end_with_the_same_bytes(slow_source: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    build(slow_source, whole, samples_per_shard=4)
    command = [Path(sys.executable).with_name("clip-data"), "build", slow_source, out]
    unfinished = 0
    for kill_at in (0, 3, 9):  # shards done
        process = subprocess.Popen(
            [*command, "--samples-per-shard", "4", "--workers", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(out.glob("*_stats.json"))) < kill_at:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not (out / "manifest.json").exists()
    assert unfinished
    (out / "00011.tar.partial").write_bytes(b"half a shard")
    build(slow_source, out, samples_per_shard=4)
    assert contents(out) == contents(whole)
    assert verify(out).faults == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(captioned: Path, tmp_path: Path, clip_data: Clip) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    result = clip_data("build", captioned, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: [Errno 13] Permission denied")


def test_source_may_move(captioned: Path, tmp_path: Path) -> None:
    build(captioned, tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.move(captioned, tmp_path / "moved")
    build(tmp_path / "moved", tmp_path / "out")
    assert contents(tmp_path / "out") == before
