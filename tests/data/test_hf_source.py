"""Hugging Face data sets as a source, by what `datasets` itself reads."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_data.errors import DataError, RowError
from clip_data.hf_source import is_hf, open_hf
from clip_data.opened import PLACE, Opened
from clip_data.samples import Row
from upath import UPath

from .conftest import picture

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "captions": datasets.List(datasets.Value("string")),
        "photo": datasets.Image(),
        "label": datasets.ClassLabel(names=["dog", "cat", "bird"]),
        "mask": datasets.Image(),
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` makes its files here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def rows(start: int, end: int) -> list[dict[str, Any]]:
    """Rows of FEATURES, every second image with a name."""
    return [
        {
            "text": f"picture {n}",
            "captions": [f"a {n}", f"b {n}"],
            "photo": {"path": f"{n}.png" if n % 2 else None, "bytes": picture(n)},
            "label": n % 4 - 1,  # -1: none
            "mask": {"path": None, "bytes": picture(n)},
        }
        for n in range(start, end)
    ]


def data_set(start: int = 0, end: int = 8) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(start, end), features=FEATURES)


def read(opened: Opened) -> list[tuple[dict[str, Any], bytes]]:
    """The records, and their images by a reader that has gone to a worker."""
    records = list(opened.records())
    assert records == list(opened.records())
    assert all(list(record) == [*record] and PLACE in record for record in records)  # type: ignore
    reader = pickle.loads(pickle.dumps(opened.reader))
    image = opened.image_column
    todo = [Row(r[image], place=tuple(r.pop(PLACE))) for r in records]  # type: ignore
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda read: read(), reader.images(todo)))
    assert [reader.version(row) for row in todo] == [len(data) for data in images]
    return list(zip(records, images, strict=True))  # type: ignore


def expected(start: int, end: int) -> list[tuple[dict[str, Any], bytes]]:
    """What `read` gives for rows of FEATURES."""
    return [
        (
            {
                "photo": row["photo"]["path"] or f"row {at}",
                "text": row["text"],
                "captions": row["captions"],
                "label": [None, "dog", "cat", "bird"][row["label"] + 1],
            },
            row["photo"]["bytes"],
        )
        for at, row in enumerate(rows(start, end))
    ]


def test_saved_data_set_of_several_files(tmp_path: Path) -> None:
    data_set().save_to_disk(tmp_path / "saved", num_shards=3)
    assert is_hf(UPath(tmp_path / "saved"))
    opened = open_hf(UPath(tmp_path / "saved"), None)
    assert (opened.columns[0], opened.image_column) == ("photo", "photo")
    assert set(opened.columns) == {"photo", "text", "captions", "label"}
    assert opened.class_names == {"label": ["dog", "cat", "bird"]}
    assert read(opened) == expected(0, 8)
    theirs = datasets.load_from_disk(tmp_path / "saved")
    theirs = theirs.cast_column("photo", datasets.Image(decode=False))
    assert [row["photo"]["bytes"] for row in theirs] == [image for _, image in read(opened)]
    assert read(open_hf(str(tmp_path / "saved"), None, "mask"))[3][0]["mask"] == "row 3"


def test_rows_stay_together_where_batches_are_large(tmp_path: Path) -> None:
    images = [{"bytes": b"%d" % n, "path": None} for n in range(3000)]
    features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images, "n": range(3000)}, features=features)
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    found = read(open_hf(UPath(tmp_path / "saved"), None))
    assert [(record["n"], image) for record, image in found] == [
        (n, b"%d" % n) for n in range(3000)
    ]
    assert found[2999][0]["image"] == "row 2999"


def test_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": data_set(0, 4), "test": data_set(4, 6)})
    both.save_to_disk(tmp_path / "saved")
    assert is_hf(UPath(tmp_path / "saved"))
    assert read(open_hf(UPath(tmp_path / "saved"), "test")) == expected(4, 6)
    with pytest.raises(DataError, match="several splits; found train, test; give --source-split"):
        open_hf(UPath(tmp_path / "saved"), None)
    with pytest.raises(DataError, match="no split 'val'; found train, test"):
        open_hf(UPath(tmp_path / "saved"), "val")


def test_arrow_file(tmp_path: Path) -> None:
    data_set().save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    moved = file.rename(tmp_path / "some.arrow")
    assert is_hf(UPath(moved))
    assert read(open_hf(UPath(moved), None)) == expected(0, 8)
    moved.write_bytes(moved.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"some\.arrow: .*cannot open it"):
        open_hf(UPath(moved), None)


@pytest.mark.parametrize("rows_per_group", [1, 100])
def test_parquet_of_datasets(tmp_path: Path, rows_per_group: int) -> None:
    data_set().to_parquet(tmp_path / "some.parquet", batch_size=rows_per_group)
    assert is_hf(UPath(tmp_path / "some.parquet"))
    opened = open_hf(UPath(tmp_path / "some.parquet"), None)
    assert read(opened) == expected(0, 8)
    assert opened.class_names == {"label": ["dog", "cat", "bird"]}


@pytest.mark.parametrize("data", ["", "data"])
def test_folder_of_parquet(tmp_path: Path, data: str) -> None:
    folder = tmp_path / "folder" / data
    folder.mkdir(parents=True)
    for n in range(3):
        part = data_set(2 * n, 2 * n + 2)
        part.to_parquet(folder / f"{'test' if n == 2 else 'train'}-0000{n}-of-00003.parquet")
    assert is_hf(UPath(tmp_path / "folder"))
    assert read(open_hf(UPath(tmp_path / "folder"), "train")) == expected(0, 4)
    assert read(open_hf(UPath(tmp_path / "folder"), "test")) == expected(4, 6)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary()})]
)
def test_parquet_of_others(tmp_path: Path, kind: Any) -> None:
    images = [{"bytes": picture(n)} if pa.types.is_struct(kind) else picture(n) for n in range(3)]
    table = pa.table({"url": ["a", "b", "c"], "jpg": pa.array(images, kind)})
    pq.write_table(table, tmp_path / "some[1].parquet")
    path = UPath(tmp_path / "some[1].parquet")
    assert is_hf(path)
    assert read(open_hf(path, None)) == [
        ({"jpg": f"row {n}", "url": "abc"[n]}, picture(n)) for n in range(3)
    ]
    with pytest.raises(DataError, match=r"no column 'url' of images; found url .*string.*, jpg"):
        open_hf(path, None, "url")


def test_remote_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # forbids any remote file
    path = UPath("memory://hf-source/some.parquet")
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        pq.write_table(pa.table({"jpg": [picture(1)]}), file)
    assert is_hf(path)
    assert read(open_hf(path, None)) == [({"jpg": "row 0"}, picture(1))]


def test_what_is_not_of_hugging_face(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "sizes": [[1]]}), tmp_path / "urls.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "some.csv").write_text("image\n")
    for name in ("", "urls.parquet", "bad.parquet", "some.csv", "nothing", "nothing.parquet"):
        assert not is_hf(UPath(tmp_path / name)), name


def test_images_outside_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "in.png").write_bytes(picture(1))
    (tmp_path / "out.png").write_bytes(picture(2))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    paths = ["in.png", f"{folder}/in.png", "../out.png", f"{tmp_path}/out.png", "link.png"]
    paths += ["gone.png", "https://host/x.png", "\0", None]
    images = pa.array(
        [{"bytes": None, "path": path} for path in paths[:-1]] + [None], datasets.Image().pa_type
    )
    table = pa.table({"image": images, "n": range(len(paths))})
    features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
    table = table.cast(features.arrow_schema)
    with (
        pa.OSFile(f"{folder}/some.arrow", "wb") as file,
        pa.ipc.new_stream(file, table.schema) as w,
    ):
        w.write_table(table)
    opened = open_hf(UPath(folder / "some.arrow"), None)
    found: list[bytes | str] = []
    todo = [Row(r["image"], place=r[PLACE]) for r in opened.records()]  # type: ignore
    for image in opened.reader.images(todo):
        try:
            found.append(image())
        except RowError as error:
            found.append(error.reason)
    outside, missing = "path outside the source folder", "missing file"
    assert found[:2] == [picture(1)] * 2
    assert found[2:] == [outside, outside, outside, missing, missing, missing, "no image"]
    assert todo[-1].image == "row 8"
    assert [opened.reader.version(row) for row in todo[:2]] == [len(picture(1))] * 2
    assert opened.reader.version(todo[5]) == -1


def test_no_column_of_images(tmp_path: Path) -> None:
    album = datasets.Features({"album": datasets.List(datasets.Image())})
    lists = datasets.Dataset.from_list([{"album": [{"bytes": picture(1)}]}], features=album)
    lists.save_to_disk(tmp_path / "lists")
    with pytest.raises(DataError, match=r"album \(List.*not a list of images, in each row"):
        open_hf(UPath(tmp_path / "lists"), None)
    datasets.Dataset.from_dict({"a": [1], "b": ["x"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(
        DataError, match=r"no column of images; found a \(.*int64.*\), b \(.*string"
    ):
        open_hf(UPath(tmp_path / "texts"), None)


def test_damaged_archive(tmp_path: Path) -> None:
    data_set().save_to_disk(tmp_path / "saved")
    opened = open_hf(UPath(tmp_path / "saved"), None)
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"damaged Arrow file"):
        list(opened.records())
    with pytest.raises(DataError, match=r"saved: .* cannot open it"):
        open_hf(UPath(tmp_path / "saved"), None)
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"saved: .* cannot open it"):
        open_hf(UPath(tmp_path / "saved"), None)


def test_hub_offline(tmp_path: Path, cache: Path) -> None:
    data_set().to_parquet(tmp_path / "some.parquet")
    (made,) = {
        Path(file["filename"]).parent
        for file in datasets.load_dataset("parquet", data_files=str(tmp_path / "some.parquet"))[
            "train"
        ].cache_files
    }
    info = json.loads((made / "dataset_info.json").read_text())
    info.update(config_name="default", dataset_name="name")
    (made / "dataset_info.json").write_text(json.dumps(info))
    (made / "parquet-train.arrow").rename(made / "name-train.arrow")
    hub = cache / "owner___name/default/0.0.0"
    hub.mkdir(parents=True)
    made.rename(hub / "0123")
    # in a process of its own: the flags are read where the libraries are imported
    code = """if True:
        import json, sys
        from clip_data.errors import DataError
        from clip_data.hf_source import is_hf, open_hf
        assert is_hf("hf://datasets/owner/name")
        opened = open_hf("hf://datasets/owner/name", "train")
        texts = [record["text"] for record in opened.records()]
        try:
            open_hf("hf://datasets/owner/other", None)
        except DataError as error:
            print(json.dumps([texts, str(error)]))
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    texts, error = json.loads(done.stdout)  # and nothing else there
    assert texts == [f"picture {n}" for n in range(8)]
    assert error.startswith("hf://datasets/owner/other: `datasets` cannot open it: ")
    assert "\n" not in error
