"""Inspection, against a count made here of the same shards; and its page."""

import io
import re
import tarfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from clip_data.inspector import Inspection, inspect
from PIL import Image
from upath import UPath

from .conftest import picture

HOSTILE = "<script>alert('x')</script> & \"quotes\" \x0b </figure>"
Sample = dict[str, bytes]


def write_tar(path: Path, samples: dict[str, Sample]) -> None:
    """A tar without sidecars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def captioned(n: int) -> dict[str, Sample]:
    """Pictures of several sizes; captions of 0 to 4 words, one of them hostile."""
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
    samples: dict[str, Sample] = {}
    for number in range(n):
        extension, kind = kinds[number % 3]
        size = (8 + number % 5, 16 + number % 7)
        caption = (
            HOSTILE if number == 3 else " ".join(["The", "red", "dog’s", "tail"][: number % 5])
        )
        samples[f"{number:09d}"] = {
            extension: picture(number, kind, size),
            "txt": caption.encode(),
            "json": b"{}",
        }
    return samples


@pytest.fixture
def shards(tmp_path: Path) -> UPath:
    """Three tars, of one which the end is missing; bad images and captions in the last."""
    samples = list(captioned(40).items())
    write_tar(tmp_path / "in/00000.tar", dict(samples[:20]))
    write_tar(tmp_path / "in/00001.tar", dict(samples[20:]))
    odd: dict[str, Sample] = {
        "a": {"txt": b"caf\xe9 noir"},
        "b": {"png": b"no image", "txt": "犬と猫".encode()},
        "c": {"png": picture(0)},
    }
    write_tar(tmp_path / "in/00002.tar", odd)
    data = (tmp_path / "in/00002.tar").read_bytes()
    (tmp_path / "in/00002.tar").write_bytes(data.rstrip(b"\0") + bytes(512))
    return UPath(tmp_path / "in")


def test_counts_are_those_of_a_plain_recount(shards: UPath, tmp_path: Path) -> None:
    found = inspect(shards, samples=10, workers=1)
    samples = captioned(40)
    texts = [sample["txt"].decode() for sample in samples.values()]
    texts = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
    texts += ["caf\ufffd noir", "犬と猫"]
    assert (found.shards, found.samples, found.captions) == (3, 43, len(texts))
    assert found.without_caption == sum(not s["txt"] for s in samples.values()) + 1
    assert (found.without_image, found.unreadable_images, found.not_utf8) == (1, 1, 1)
    assert list(found.damaged) == [str(shards / "00002.tar")]
    assert found.bytes == sum(tar.stat().st_size for tar in shards.iterdir())
    assert found.extensions == {"txt": 42, "json": 40, "jpg": 14, "png": 15, "webp": 13}
    words = Counter(w for text in texts[:-1] for w in re.findall(r"[\w’']+", text.lower()))
    words.update("犬と猫")
    assert {each.text: each.count for each in found.words} == words
    counts = [each.count for each in found.words]
    assert counts == sorted(counts, reverse=True)
    assert {c.text: c.count for c in found.repeated_captions} == {
        text: count for text, count in Counter(texts).items() if count > 1
    }
    assert found.near_empty == texts.count("The") == found.near_empty_captions[0].count
    sizes = [Image.open(io.BytesIO(next(iter(s.values())))).size for s in samples.values()]
    sizes.append((12, 9))
    values: dict[str, list[float]] = {
        "caption_characters": [len(text) for text in texts],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "aspect": [width / height for width, height in sizes],
    }
    for name, expected in values.items():
        histogram = found.histograms[name]
        assert sum(histogram.counts) == len(expected)
        assert (histogram.smallest, histogram.largest) == (min(expected), max(expected))
        assert histogram.mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        for low, high, count in zip(
            histogram.edges[:-2], histogram.edges[1:-1], histogram.counts[:-1], strict=True
        ):
            assert count == sum(low <= value < high for value in expected), name
    assert len({example.key for example in found.examples}) == 10


def test_same_bytes_whatever_the_workers(shards: UPath, tmp_path: Path) -> None:
    pages = [tmp_path / f"{n}.html" for n in range(3)]
    one = inspect(shards, page=UPath(pages[0]), samples=12, seed=5, workers=1)
    two = inspect(shards, page=UPath(pages[1]), samples=12, seed=5, workers=2)
    assert one == two
    assert pages[0].read_bytes() == pages[1].read_bytes()
    other = inspect(shards, page=UPath(pages[2]), samples=12, seed=6, workers=1)
    assert other.examples != one.examples
    fewer = inspect(shards, samples=4, seed=5, workers=1)
    assert fewer.examples == one.examples[:4]


class Balance(HTMLParser):
    """Checks that tags close in order, and keeps what is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags = Counter[str]()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags[tag] += 1

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(source: UPath, page: Path, samples: int = 100) -> tuple[Inspection, Balance]:
    """Inspect, and parse the page twice: as XML and as HTML."""
    found = inspect(source, page=UPath(page), samples=samples, workers=1)
    text = page.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", text)
    return found, Balance(text)


def test_page_shows_hostile_captions_as_text(shards: UPath, tmp_path: Path) -> None:
    found, parsed = read_page(shards, tmp_path / "page.html")
    assert len(found.examples) == 42
    assert "script" not in parsed.tags
    assert "<script>alert('x')</script> & \"quotes\"" in parsed.text
    assert parsed.text.count("not decodable") == 1
    assert parsed.tags["img"] == 41 + len(found.histograms)
    assert "00002.tar: " in parsed.text


def test_labelled_set(tmp_path: Path) -> None:
    for split, labels in {"train": "00011", "test": "01"}.items():
        samples = {
            f"s{n:07d}": {"png": picture(n), "cls": label.encode()}
            for n, label in enumerate(labels)
        }
        write_tar(tmp_path / "set" / split / "0.tar", samples)
        (tmp_path / "set" / split / "nshards.txt").write_text("1\n")
    (tmp_path / "set/classnames.txt").write_text("<b>cat\n\n")
    found, parsed = read_page(UPath(tmp_path / "set"), tmp_path / "page.html")
    assert found.splits == {"train": 5, "test": 2}
    assert [(each.text, each.count) for each in found.labels] == [("<b>cat", 4), ("", 3)]
    assert (found.classes, found.captions, found.without_caption) == (2, 0, 7)
    assert {example.label for example in found.examples} == {"<b>cat", ""}
    assert "<b>cat" in parsed.text


def test_set_without_images_and_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", {"k": {"txt": b" \n"}, "\udcff": {"npy": b"1"}})
    found, _ = read_page(UPath(tmp_path / "in"), tmp_path / "page.html")
    assert (found.samples, found.captions, found.without_caption) == (2, 0, 2)
    assert (found.histograms, found.examples, found.words) == ({}, [], [])
    (single, _) = read_page(UPath(tmp_path / "in/a.tar"), tmp_path / "page.html")
    assert single.samples == 2


def test_counts_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_data.tally.DISTINCT", 100)
    samples = {
        f"{n:04d}": {"txt": b"the same words" if n % 5 == 0 else f"only {n}".encode()}
        for n in range(1000)
    }
    write_tar(tmp_path / "0.tar", samples)
    found = inspect(UPath(tmp_path), workers=1)
    assert found.repeated_captions[0].text == "the same words"
    assert found.repeated_captions[0].count == 200
    assert found.words[0].text == "only"
    assert len(found.words) == 50
