"""Shards are a function of source and arguments, whatever happens on the way."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from clip_data import DataError, ImageOptions, build, verify
from clip_data.tar import TarWriter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from upath import UPath

from .conftest import Clip, contents, picture, write_captioned


@pytest.mark.parametrize("seed", [None, 3])
def test_bytes_do_not_depend_on_workers_or_runs(captioned: Path, tmp_path: Path, seed: int) -> None:
    for name, workers in {"one": 1, "two": 2, "again": 2}.items():
        build(captioned, tmp_path / name, workers=workers, samples_per_shard=3, shuffle_seed=seed)
    one = contents(tmp_path / "one")
    assert len([name for name in one if name.endswith(".tar")]) == 4
    assert one == contents(tmp_path / "two") == contents(tmp_path / "again")


def test_threads_of_one_shard(captioned: Path, tmp_path: Path) -> None:
    (captioned / "003.png").write_bytes(b"broken")
    build(captioned, tmp_path / "one", workers=1)
    build(captioned, tmp_path / "four", workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


@pytest.mark.slow
def test_ray(captioned: Path, tmp_path: Path) -> None:
    """In one process, which does not start Ray anew for each build."""
    import ray

    (captioned / "003.png").write_bytes(b"broken")
    build(captioned, tmp_path / "local", samples_per_shard=3)
    build(captioned, tmp_path / "own", samples_per_shard=3, engine="ray", workers=2)
    assert not ray.is_initialized()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    assert on_sigterm is signal.SIG_DFL
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        build(captioned, tmp_path / "theirs", samples_per_shard=3, engine="ray")
        assert ray.is_initialized()
        for number in range(5):
            (captioned / f"00{number}.png").write_bytes(b"broken")
        with pytest.raises(DataError, match="of 10 rows are bad"):
            build(captioned, tmp_path / "bad", samples_per_shard=2, engine="ray")
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)
    assert contents(tmp_path / "local") == contents(tmp_path / "own")
    assert contents(tmp_path / "local") == contents(tmp_path / "theirs")
    assert not (tmp_path / "bad/manifest.json").exists()


def test_source_and_output_may_be_urls(captioned: Path, tmp_path: Path) -> None:
    """An in-memory file system has no links and no rename, as an object store."""
    source, out = UPath("memory://source"), UPath("memory://out")
    for path in captioned.iterdir():
        (source / "deep" / path.name).write_bytes(path.read_bytes())
    (source / "deep/000.txt").write_text("../../escape")
    build(source, out, samples_per_shard=4)
    (captioned / "000.txt").write_text("../../escape")
    (tmp_path / "in").mkdir()
    shutil.move(captioned, tmp_path / "in/deep")
    build(tmp_path / "in", tmp_path / "local", samples_per_shard=4)
    local = contents(tmp_path / "local")
    assert sorted(local) == sorted(path.name for path in out.iterdir())
    for name, data in local.items():
        if name.endswith((".tar", ".index.json")):
            assert (out / name).read_bytes() == data
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "00001.tar").unlink()
    build(source, out, samples_per_shard=4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert verify(out).faults == {}


def test_a_split_by_hash_is_a_partition(tmp_path: Path) -> None:
    source = write_captioned(tmp_path / "in", 60)
    captions: list[set[str]] = []
    for share in ((0.0, 0.8), (0.8, 1.0), (0.0, 0.4)):
        out = tmp_path / f"out-{share}"
        build(source, out, hash_range=share)
        rows = pq.read_table(out / "00000.parquet", columns=["caption"]).to_pylist()
        captions.append({row["caption"] for row in rows})
    assert not captions[0] & captions[1]
    assert len(captions[0] | captions[1]) == 60
    assert captions[2] < captions[0]
    assert 30 < len(captions[0]) < 60


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


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=110),
    size=st.integers(0, 3000),
)
def test_tar_members_are_as_python_writes_them(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        header = member.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # no room in ustar
        return
    file = io.BytesIO()
    assert TarWriter(file).add(name, b"x" * size) == [len(header), size]
    assert file.getvalue() == header + b"x" * size + bytes(-size % 512)


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
    with pytest.raises(DataError, match="of another source, of other arguments"):
        build(other, out)
    with pytest.raises(DataError, match="of another source, of other arguments"):
        build(captioned, out, shuffle_seed=1)
    (captioned / "003.txt").write_text("another caption")
    with pytest.raises(DataError, match="of another source, of other arguments"):
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


def test_retry_failed_tries_only_what_failed(captioned: Path, tmp_path: Path) -> None:
    out, broken = tmp_path / "out", captioned / "004.png"
    picture_4 = broken.read_bytes()
    broken.write_bytes(b"broken")
    assert build(captioned, out, samples_per_shard=5).failed == 1
    broken.write_bytes(picture_4)
    with pytest.raises(DataError, match="of another source"):
        build(captioned, out, samples_per_shard=5)
    for path in captioned.glob("*.png"):
        if path != broken:  # of the same size, so that only reading tells
            path.write_bytes(bytes(path.stat().st_size))
    assert build(captioned, out, samples_per_shard=5, retry_failed=True).failed == 0
    again = contents(out)
    shutil.rmtree(captioned)
    build(write_captioned(captioned, 10), tmp_path / "fresh", samples_per_shard=5)
    assert again == contents(tmp_path / "fresh")


def test_other_image_options_make_another_build(captioned: Path, tmp_path: Path) -> None:
    build(captioned, tmp_path / "out")
    with pytest.raises(DataError, match="of another source, of other arguments"):
        build(captioned, tmp_path / "out", images=ImageOptions(image_size=4))


def test_other_columns_are_kept(captioned: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "000.png", "caption": "a", "similarity": 0.5, "tags": ["x"], "odd": 1},
        {"image": "001.png", "caption": "b", "similarity": 1, "tags": [], "odd": "text"},
        {"image": "absent.png", "caption": "c", "similarity": None, "width": 7},
    ]
    (captioned / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(captioned / "rows.jsonl", tmp_path / "out", max_error_share=0.5)
    table = pq.read_table(tmp_path / "out/00000.parquet").to_pylist()
    assert [row["similarity"] for row in table] == [0.5, 1.0, None]
    assert [row["tags"] for row in table] == [["x"], [], None]
    assert [row["odd"] for row in table] == ["1", '"text"', None]
    assert [row["width"] for row in table] == [12, 12, None]


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
    for kill_at in (0, 3, 9):  # shards done; test_killed_anywhere has 20 random moments
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


@pytest.mark.slow
def test_killed_anywhere(slow_source: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["--samples-per-shard", "4", "--workers", "2", "--shuffle-seed", "1"]
    command = [Path(sys.executable).with_name("clip-data"), "build", slow_source]
    start = time.monotonic()
    subprocess.run([*command, whole, *arguments], check=True, capture_output=True)
    seconds = time.monotonic() - start
    moments, unfinished = random.Random(1), 0
    for _ in range(20):
        process = subprocess.Popen(
            [*command, out, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.2, 1.0) * seconds)
        process.kill()
        process.wait()
        unfinished += not (out / "manifest.json").exists()
        if (out / "manifest.json").exists():
            shutil.rmtree(out)
    assert unfinished >= 5
    subprocess.run([*command, out, *arguments], check=True, capture_output=True)
    assert contents(out) == contents(whole)


def test_a_full_disk_loses_nothing(captioned: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in: the third shard does not fit."""
    noise = Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(300 * 300 * 3))
    noise.save(captioned / "008.png")
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1));"
        "from clip_data.cli import main; main()"
    )
    arguments = ["build", str(captioned), str(tmp_path / "out"), "--samples-per-shard", "4"]
    command = [sys.executable, "-c", code, *arguments, "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: [Errno 27] File too large")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        "00000.tar",
        "00001.tar",
    ]
    first = (tmp_path / "out/00000.tar").stat().st_mtime_ns
    build(captioned, tmp_path / "out", samples_per_shard=4)
    assert (tmp_path / "out/00000.tar").stat().st_mtime_ns == first
    assert verify(tmp_path / "out").faults == {}


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
