"""Each bad row has its named outcome, and costs no good one."""

import json
import os
import struct
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from clip_data import DataError, build, verify
from PIL import Image

from .conftest import picture, write_captioned


def png_bomb() -> bytes:
    """A small PNG whose header promises 100,000 x 100,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return picture(0)[:8] + chunk + picture(0)[33:]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A table with three good rows among bad ones, each image named after its fault."""
    root = tmp_path / "in"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("good", "empty caption", "not utf8"):
        (root / f"{name}.png").write_bytes(picture(2))
    (root / "truncated.jpg").write_bytes(picture(3, "JPEG", (200, 200))[:-200])
    (root / "text.png").write_text("<html>not found</html>")
    (root / "bomb.png").write_bytes(png_bomb())
    (root / "folder.png").mkdir()
    lines = [
        b"good.png,first",
        b"absent.png,a",
        b"link.png,a",
        b"../secret.png,a",
        b"good.png,second",
        b"empty caption.png, ",
        b"not utf8.png,caf\xe9",
        b"truncated.jpg,a",
        b"text.png,a",
        b"bomb.png,a",
        b"folder.png,a",
        b"good.png,one,too many",
        b",a",
        b"good.png,nul \0 inside",
        b"good.png,third",
    ]
    (root / "rows.csv").write_bytes(b"\n".join([b"image,caption", *lines]))
    return root / "rows.csv"


def test_every_fault_is_named(faulty: Path, tmp_path: Path) -> None:
    summary = build(faulty, tmp_path / "out", max_error_share=1)
    assert summary.samples == 3
    assert summary.failed == 12
    assert summary.reasons == {
        "caption is not UTF-8": 1,
        "caption with a NUL": 1,
        "corrupt image": 1,
        "empty caption": 1,
        "missing file": 2,
        "no image path": 1,
        "not an image": 1,
        "path outside the source folder": 2,
        "too many pixels": 1,
        "wrong number of columns": 1,
    }
    rows = pq.read_table(tmp_path / "out/00000.parquet").to_pylist()
    assert len(rows) == 15
    by_image = {row["image"]: row["reason"] for row in rows}
    assert by_image["truncated.jpg"] == "corrupt image"
    assert by_image["link.png"] == "path outside the source folder"
    assert by_image["line 13"] == "wrong number of columns"
    good = [row for row in rows if row["status"] == "success"]
    assert [(row["key"], row["caption"]) for row in good] == [
        ("000000000", "first"),
        ("000000004", "second"),
        ("000000014", "third"),
    ]
    assert verify(tmp_path / "out").faults == {}


def test_names_that_differ_only_in_case_are_remarked(captioned: Path, tmp_path: Path) -> None:
    (captioned / "000.PNG").write_bytes(picture(99))
    summary = build(captioned, tmp_path / "out")
    assert (summary.samples, summary.failed) == (11, 0)
    assert summary.remarks == {"name differs only in case": 1}
    rows = pq.read_table(tmp_path / "out/00000.parquet").to_pylist()
    details = {row["image"]: row["detail"] for row in rows if row["detail"]}
    assert details == {"000.png": "name differs only in case from 000.PNG"}


def test_too_many_bad_rows_fail_the_build(faulty: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of 15 rows are bad.*absent\.png: missing file; link"):
        build(faulty, tmp_path / "out", max_error_share=0.5)
    assert not (tmp_path / "out/manifest.json").exists()


def test_repaired_rows_are_tried_again(captioned: Path, tmp_path: Path) -> None:
    broken = captioned / "004.png"
    broken.write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 10 rows are bad.*004\.png: not an image"):
        build(captioned, tmp_path / "out", samples_per_shard=2, max_error_share=0)
    broken.write_bytes(picture(4))
    summary = build(captioned, tmp_path / "out", samples_per_shard=2, max_error_share=0)
    assert (summary.samples, summary.failed) == (10, 0)


def test_a_whole_shard_may_be_bad(captioned: Path, tmp_path: Path) -> None:
    for name in ("002", "003"):
        (captioned / f"{name}.txt").write_text(" \n")
    summary = build(captioned, tmp_path / "out", samples_per_shard=2, max_error_share=0.2)
    assert summary.reasons == {"empty caption": 2}
    assert json.loads((tmp_path / "out/sizes.json").read_text())["00001.tar"] == 0
    assert verify(tmp_path / "out").faults == {}


def test_lone_surrogates_and_bad_json_lines(captioned: Path, tmp_path: Path) -> None:
    lines = [
        r'{"image": "000.png", "caption": "\ud800"}',
        "[]",
        "{",
        '{"image": 3, "caption": "a"}',
    ]
    good = '{"image": "001.png", "caption": "good"}'
    (captioned / "rows.jsonl").write_text("\n".join([good, *lines, ""]))
    summary = build(captioned / "rows.jsonl", tmp_path / "out", max_error_share=0.8)
    assert summary.samples == 1
    assert summary.reasons == {
        "caption is not UTF-8": 1,
        "no image path": 1,
        "not a JSON object": 2,
    }


def test_file_names_that_are_not_utf8(captioned: Path, tmp_path: Path) -> None:
    folder = os.fsencode(captioned)
    os.rename(folder + b"/000.png", folder + b"/caf\xe9.png")
    os.rename(folder + b"/000.txt", folder + b"/caf\xe9.txt")
    assert build(captioned, tmp_path / "out").samples == 10


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_other_formats_of_any_mode_become_png(tmp_path: Path, mode: str) -> None:
    folder = write_captioned(tmp_path / "in", 1)
    Image.new(mode, (8, 8)).save(folder / "000.png", "TIFF")
    assert build(folder, tmp_path / "out").samples == 1


def test_damaged_files_never_end_a_build(tmp_path: Path) -> None:
    """Cut and altered files of every format: each row has an outcome."""
    folder = write_captioned(tmp_path / "in", 1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = picture(9, kind)
        for at in range(1, len(data), max(1, len(data) // 25)):
            flipped = data[:at] + b"\xff" + data[at + 1 :]
            for how, damaged in {"cut": data[:at], "flip": flipped}.items():
                (folder / f"{kind}-{at}-{how}.png").write_bytes(damaged)
                (folder / f"{kind}-{at}-{how}.txt").write_text("damaged")
    summary = build(folder, tmp_path / "out", max_error_share=1)
    assert summary.failed > 50
    assert verify(tmp_path / "out").faults == {}
