"""Every kind of source becomes the same samples."""

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_data import ColumnOptions, DataError, build

from .conftest import picture, write_captioned, write_classes

RECORDS = [
    {"image": f"img/{n}.png", "caption": f"picture {n}", "kind": "ab"[n % 2], "source": n}
    for n in range(4)
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with the images of RECORDS, for a table beside them."""
    (tmp_path / "img").mkdir()
    for n in range(4):
        (tmp_path / f"img/{n}.png").write_bytes(picture(n))
    return tmp_path


def write_table(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records in the format of the file's suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with path.open("w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    return path


def members(tar: Path) -> dict[str, bytes]:
    """Every member of a tar."""
    with tarfile.open(tar) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_table(table: Path, suffix: str) -> None:
    source = write_table(table / f"rows.{suffix}", RECORDS)
    summary = build(source, table / "out", columns=ColumnOptions(label="kind"))
    assert (summary.samples, summary.failed, summary.shards) == (4, 0, 1)
    found = members(table / "out/00000.tar")
    assert len(found) == 4 * 4
    assert found["000000003.png"] == picture(3)
    assert found["000000003.txt"] == b"picture 3"
    assert found["000000003.cls"] == b"1"
    assert json.loads(found["000000003.json"]) == {
        "source": "3" if suffix in ("csv", "tsv") else 3,
        "key": "000000003",
        "image": "img/3.png",
        "width": 12,
        "height": 9,
    }


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_list_of_captions_is_one_per_line(table: Path, suffix: str) -> None:
    records = [{"path": "img/0.png", "texts": ["one", "two\nlines", " "]}]
    source = write_table(table / f"rows.{suffix}", records)
    build(source, table / "out", columns=ColumnOptions("path", captions=("texts",)))
    assert members(table / "out/00000.tar")["000000000.txt"] == b"one\ntwo lines"


def test_several_caption_columns(table: Path) -> None:
    records = [{"image": "img/0.png", "alt": "one", "texts": ["two", ""], "title": None}]
    source = write_table(table / "rows.jsonl", records)
    columns = ColumnOptions(captions=("texts", "alt", "title"))
    build(source, table / "out", columns=columns)
    assert members(table / "out/00000.tar")["000000000.txt"] == b"two\none"


def test_folder_of_parquet_files(table: Path) -> None:
    for n, record in enumerate(RECORDS):
        write_table(table / f"part-{n}.parquet", [record])
    assert build(table, table / "out").samples == 4


def test_table_of_labels_needs_no_captions(table: Path) -> None:
    source = write_table(table / "rows.csv", [{"image": "img/0.png", "label": "cat"}])
    build(source, table / "out", columns=ColumnOptions(label="label"))
    assert set(members(table / "out/00000.tar")) == {
        f"000000000.{e}" for e in ("png", "json", "cls")
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "columns",
    [
        ColumnOptions(image="absent"),
        ColumnOptions(url="absent"),
        ColumnOptions(captions=("caption", "absent")),
        ColumnOptions(label="absent"),
    ],
)
def test_missing_column(table: Path, suffix: str, columns: ColumnOptions) -> None:
    source = write_table(table / f"rows.{suffix}", RECORDS)
    with pytest.raises(DataError, match="no column 'absent'; found 'image', 'caption'"):
        build(source, table / "out", columns=columns)
    assert not (table / "out").exists()


def test_captions_in_json_beside_images(tmp_path: Path) -> None:
    folder = write_captioned(tmp_path / "in", 2)
    (folder / "001.txt").unlink()
    (folder / "001.json").write_text(json.dumps({"caption": "from json", "license": "CC0"}))
    build(folder, tmp_path / "out")
    found = members(tmp_path / "out/00000.tar")
    assert found["000000000.txt"] == b"picture 0"
    assert found["000000001.txt"] == b"from json"
    assert json.loads(found["000000001.json"])["license"] == "CC0"


def test_folder_per_class(tmp_path: Path) -> None:
    build(write_classes(tmp_path / "in", {"dog": 1, "cat": 2}), tmp_path / "out")
    found = members(tmp_path / "out/00000.tar")
    assert [found[f"00000000{n}.cls"] for n in range(3)] == [b"0", b"0", b"1"]
    assert (tmp_path / "out/classnames.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "png"), ("TIFF", "png")],
)
def test_format_not_name_tells_the_extension(tmp_path: Path, kind: str, extension: str) -> None:
    folder = write_captioned(tmp_path / "in", 1)
    (folder / "000.png").write_bytes(picture(5, kind))
    build(folder, tmp_path / "out")
    data = members(tmp_path / "out/00000.tar")[f"000000000.{extension}"]
    # Bytes of the three formats are kept; others become PNG, of the same pixels.
    assert data == picture(5, kind if extension == kind.lower() or kind == "JPEG" else "PNG")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such source"),
        ("empty", "no images"),
        ("notes.pdf", "unknown kind of source"),
        ("empty.csv", "no rows"),
        ("fake.parquet", "not a readable Parquet file"),
    ],
)
def test_unusable_source(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "empty.csv").write_text("image,caption\n")
    (tmp_path / "fake.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=message):
        build(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
