"""Tars as a source: whoever wrote them, and whatever is wrong with them."""

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import webdataset
from clip_data.errors import DataError, RowError
from clip_data.opened import PLACE, REMARK, Opened
from clip_data.samples import Row
from clip_data.tar import TarWriter, build_index, index_path, read_samples
from clip_data.tar_source import is_tars, open_tars
from upath import UPath

from .conftest import picture

Members = Sequence[tuple[str, bytes]]


def write_tar(path: UPath, members: Members) -> UPath:
    """A tar of members in this order."""
    with path.open("wb") as file:
        writer = TarWriter(file)  # type: ignore[arg-type]
        for name, data in members:
            writer.add(name, data)
        writer.close()
    return path


def captioned(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """Members of samples with captions."""
    return [
        member
        for n in numbers
        for member in ((f"{n:09d}.png", picture(n)), (f"{n:09d}.txt", f"picture {n}".encode()))
    ]


def read(opened: Opened) -> list[tuple[dict[str, Any], bytes]]:
    """The good records, and their images by a reader that has gone to a worker."""
    records = [record for record in opened.records() if isinstance(record, dict)]
    reader = pickle.loads(pickle.dumps(opened.reader))
    rows = [Row(record["image"], place=tuple(record.pop(PLACE))) for record in records]
    assert [reader.version(row) for row in rows] == [row.place[2] for row in rows]
    with ThreadPoolExecutor(4) as pool:
        return list(zip(records, pool.map(lambda image: image(), reader.images(rows)), strict=True))


def faults(opened: Opened) -> list[tuple[str, str]]:
    """The bad records."""
    return [(r.reason, r.detail) for r in opened.records() if isinstance(r, RowError)]


def test_what_webdataset_writes(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for n in range(shard * 3, shard * 3 + 3):
                about = {"page": n, "width": 1, "height": 2, "key": "old", "caption": "not this"}
                sample = {"jpg": picture(n, "JPEG"), "txt": f"a\nb {n}", "cls": n, "json": about}
                writer.write({"__key__": f"s{n}", **sample})
    opened = open_tars(UPath(tmp_path))
    assert (opened.columns, opened.image_column) == (["image", "page", "caption", "class"], "image")
    assert read(opened) == [
        (
            {
                "image": f"{n // 3}.tar/s{n}.jpg",
                "page": n,
                "caption": ["a", f"b {n}"],
                "class": str(n),
            },
            picture(n, "JPEG"),
        )
        for n in range(6)
    ]
    assert list(opened.records()) == list(opened.records())
    tars = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    theirs = webdataset.WebDataset(tars, shardshuffle=False)
    assert [sample["jpg"] for sample in theirs] == [data for _, data in read(opened)]


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for n in (0, 2):  # the download of the row between has failed
        about = {
            "caption": f"picture {n}",
            "url": f"http://host/{n}",
            "key": f"00000000{n}",
            "status": "success",
            "error_message": None,
            "width": 12,
            "height": 9,
            "original_width": 12,
            "original_height": 9,
            "exif": "{}",
            "sha256": "0" * 64,
            "similarity": 0.3,
        }
        members += [(f"00000000{n}.jpg", picture(n, "JPEG"))]
        members += [(f"00000000{n}.json", json.dumps(about, indent=4).encode())]
        members += [(f"00000000{n}.txt", about["caption"].encode())] if n else []  # type: ignore[attr-defined]
    write_tar(UPath(tmp_path / "00000.tar"), members)
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    records = [record for record, _ in read(open_tars(UPath(tmp_path)))]
    assert [record["caption"] for record in records] == ["picture 0", ["picture 2"]]
    assert {*records[0]} == {*about, "image"} - {"key", "width", "height"}


@pytest.mark.parametrize("place", ["set", "set/test", "set/test/0.tar"])
def test_class_names_of_a_labelled_set(tmp_path: Path, place: str) -> None:
    (tmp_path / "set/test").mkdir(parents=True)
    (tmp_path / "set/classnames.txt").write_text("cat\n\ndog\n")
    (tmp_path / "set/test/nshards.txt").write_text("1\n")
    labels = ["2", "1", "0\n", "3", "-1", "cat", "9" * 5000]
    members: list[tuple[str, bytes]] = []
    for n, label in enumerate(labels):
        members += [(f"s{n}.webp", picture(n, "WEBP")), (f"s{n}.cls", label.encode())]
    write_tar(UPath(tmp_path / "set/test/0.tar"), members)
    assert is_tars(UPath(tmp_path / place))
    opened = open_tars(UPath(tmp_path / place))
    assert opened.columns == ["image", "class"]
    assert opened.class_names == {"class": ["cat", "", "dog"]}
    assert [record["class"] for record, _ in read(opened)] == ["dog", "", "cat"]
    assert faults(opened) == [("label not in classnames", f"0.tar/s{n}") for n in range(3, 7)]


def test_a_set_of_several_splits_is_not_one_source(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_tar(UPath(tmp_path / split / "0.tar"), captioned([1]))
    with pytest.raises(DataError, match=r"found the splits .*/test, .*/train; give one"):
        open_tars(UPath(tmp_path))
    with pytest.raises(DataError, match=r"no tars; expected a \.tar file"):
        open_tars(UPath(tmp_path / "nothing"))
    assert not is_tars(UPath(tmp_path / "nothing"))


def test_tars_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for n in (0, 2, 10):
        write_tar(UPath(tmp_path / f"{n}.tar"), captioned([n]))
    images = [record["image"] for record, _ in read(open_tars(UPath(tmp_path)))]
    assert images == ["0.tar/000000000.png", "2.tar/000000002.png", "10.tar/000000010.png"]


def test_faulty_samples(tmp_path: Path) -> None:
    image = picture(1)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))

        for name in ("good.png", "good.JPG", "../up.png", "a/../../b.png", "/etc/abs.png"):
            add(name, image)
        add("text.txt", b"no picture")
        add("good.png", image)
        add("twice.png", image)
        add("twice.json", b"[1]")
        add("twice.png", image)  # of the sample that is open: no second one
        add("link.png", b"", tarfile.SYMTYPE)
        add("link.txt", b"a link")
        add("hard.png", b"", tarfile.LNKTYPE)
        add("device.png", b"", tarfile.CHRTYPE)
        add("folder.png", b"", tarfile.DIRTYPE)
        add("latin.png", image)
        add("latin.txt", b"caf\xe9")
    opened = open_tars(UPath(tmp_path / "0.tar"))
    good = [record for record, _ in read(opened)]
    assert [record["image"] for record in good] == ["0.tar/good.jpg", "0.tar/latin.png"]
    assert good[0][REMARK] == "several images (jpg, png): the first is taken"
    assert good[1]["caption"] == ["caf\udce9"]  # which `Source` refuses as a caption
    assert faults(opened) == [
        ("unsafe name in tar", "0.tar/../up"),
        ("unsafe name in tar", "0.tar/a/../../b"),
        ("unsafe name in tar", "0.tar//etc/abs"),
        ("no image", "0.tar/text"),
        ("duplicate key", "0.tar/good"),
        ("not a JSON object", "0.tar/twice"),
        ("no image", "0.tar/link"),
    ]


def test_truncated_anywhere(tmp_path: Path) -> None:
    tar = write_tar(UPath(tmp_path / "whole.tar"), captioned(range(4)))
    with tar.open("rb") as file:
        ends = [max(offset + size for offset, size in spans.values())
                for _, spans in read_samples(file)]  # type: ignore[arg-type]  # fmt: skip
    data = tar.read_bytes()
    headers = [ends[-1] + -ends[-1] % 512]  # where the end marker starts
    cuts = {0, 1, 511, 512, 600, *range(512, headers[0], 512), *ends, *(e + 1 for e in ends)}
    cuts |= {*headers, headers[0] + 1, headers[0] + 512, headers[0] + 1023}
    for cut in sorted(cuts):
        UPath(tmp_path / "cut.tar").write_bytes(data[:cut])
        opened = open_tars(UPath(tmp_path / "cut.tar"))
        assert faults(opened) == [("tar truncated or damaged", "cut.tar")], cut
        rows = read(opened)
        whole = [n for n, end in enumerate(ends) if end + -end % 512 <= cut]
        with_captions = [(r["image"], d) for r, d in rows if r.get("caption")]
        expected = [(f"cut.tar/{n:09d}.png", picture(n)) for n in whole]
        assert with_captions == expected, cut
        assert len(rows) - len(expected) in (0, 1)  # a sample may have lost its caption only
        assert all(data == picture(n) for n, (_, data) in enumerate(rows))
    UPath(tmp_path / "cut.tar").write_bytes(b"<html>" + bytes(3000))
    assert faults(open_tars(UPath(tmp_path / "cut.tar"))) == [
        ("tar truncated or damaged", "cut.tar")
    ]


def test_index_is_used_where_it_is_of_this_tar(tmp_path: Path) -> None:
    tar = write_tar(UPath(tmp_path / "0.tar"), captioned(range(3)))
    scanned = read(open_tars(tar))
    with tar.open("rb") as file:
        samples = list(read_samples(file))  # type: ignore[arg-type]
    size = tar.stat().st_size
    index_path(tar).write_text(json.dumps(build_index(size, samples)))
    assert read(open_tars(tar)) == scanned
    index_path(tar).write_text(json.dumps(build_index(size, samples[:1])))
    assert read(open_tars(tar)) == scanned[:1]
    for stale in (json.dumps(build_index(size - 1, samples[:1])), "{", '{"format": 1}'):
        index_path(tar).write_text(stale)
        assert read(open_tars(tar)) == scanned


def test_tar_that_shrinks_or_vanishes_after_the_plan(tmp_path: Path) -> None:
    tar = write_tar(UPath(tmp_path / "0.tar"), captioned(range(2)))
    opened = open_tars(tar)
    rows = [Row("", place=record[PLACE]) for record in opened.records()]  # type: ignore[index]
    tar.write_bytes(tar.read_bytes()[:600])
    *_, last = opened.reader.images(rows)
    with pytest.raises(RowError, match="tar truncated or damaged"):
        last()
    tar.unlink()
    *_, last = opened.reader.images(rows)
    with pytest.raises(RowError, match="unreadable file"):
        last()


def test_remote_tars() -> None:
    folder = UPath("memory://tar-source/set/train")
    folder.mkdir(parents=True)
    (folder.parent / "classnames.txt").write_text("cat\ndog\n")
    for n in range(2):
        write_tar(folder / f"{n}.tar", [*captioned([n]), (f"{n:09d}.cls", b"1")])
    assert is_tars(folder)
    assert is_tars(folder / "0.tar")
    assert not is_tars(folder.parent / "classnames.txt")
    found = read(open_tars(folder))
    assert [(r["image"], r["class"], d) for r, d in found] == [
        (f"{n}.tar/{n:09d}.png", "dog", picture(n)) for n in range(2)
    ]
