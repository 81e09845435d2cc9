"""What a folder of shards holds, from one pass over its tars that decodes no picture."""

import hashlib
import io
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm
from upath import UPath

from clip_data.labelled_set import CLASS_NAMES, read_lines
from clip_data.selection import source_tars
from clip_data.tally import Histogram, Values, count_texts
from clip_data.tar import IMAGES, Span, read_samples, read_span
from clip_data.workers import run_jobs

_HEADER = 1 << 16  # bytes that tell the size of most images
_TEXT = 300  # characters of a caption that a count knows it by
_LISTED = 50

# A run of letters and digits; in Chinese and Japanese, which have no spaces, a character.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|(?:(?![぀-ヿ㐀-鿿])[\w'’])+")


@dataclass(frozen=True)
class Count:
    """How often a text is there."""

    text: str
    count: int


@dataclass(frozen=True)
class Example:
    """A sample for the contact sheet, and where its image lies."""

    shard: str
    key: str
    span: Span
    captions: list[str]
    label: str | None


@dataclass(frozen=True)
class Inspection:
    """What the shards hold. Lists of texts have the most frequent first.

    Words and captions beyond 200,000 different ones are forgotten from time to time, the rarest
    first: counts of rare ones are then too low.
    """

    source: str
    shards: int
    samples: int
    splits: dict[str, int]
    """Samples of each split, where there are splits."""
    bytes: int
    damaged: dict[str, str]
    """Tars that could be read only in part, and why."""
    extensions: dict[str, int]
    without_image: int
    unreadable_images: int
    """Of which the header does not tell the size."""
    without_caption: int
    """Samples without .txt, or with a blank one."""
    not_utf8: int
    captions: int
    """Lines of text: a sample of a retrieval set has several."""
    near_empty: int
    """Captions of a single word or none; a Chinese or Japanese character is a word."""
    near_empty_captions: list[Count]
    repeated_captions: list[Count]
    words: list[Count]
    """In lower case."""
    classes: int
    """Different values of .cls."""
    labels: list[Count]
    """Samples of each class, by name where the set has class names."""
    histograms: dict[str, Histogram]
    """Of caption lengths in characters and words; of image width, height, aspect and bytes."""
    examples: list[Example]
    """Drawn at random, each sample with an image as likely as any other."""


def _values() -> dict[str, Values]:
    return {
        "caption_characters": Values("characters", ratio=False),
        "caption_words": Values("words", ratio=False),
        "width": Values("pixels", ratio=True),
        "height": Values("pixels", ratio=True),
        "aspect": Values("width : height", ratio=True),
        "image_bytes": Values("bytes", ratio=True),
    }


@dataclass
class _Found:
    """What is known so far; the examples with their ranks."""

    damaged: dict[str, str] = field(default_factory=dict[str, str])
    totals: Counter[str] = field(default_factory=Counter[str])
    extensions: Counter[str] = field(default_factory=Counter[str])
    words: Counter[str] = field(default_factory=Counter[str])
    captions: Counter[str] = field(default_factory=Counter[str])
    near_empty: Counter[str] = field(default_factory=Counter[str])
    labels: Counter[str] = field(default_factory=Counter[str])
    values: dict[str, Values] = field(default_factory=_values)
    examples: list[tuple[str, Example]] = field(default_factory=list[tuple[str, Example]])

    def add_caption(self, caption: str) -> None:
        words = _WORD.findall(caption.lower())
        self.totals["captions"] += 1
        self.values["caption_characters"].add(len(caption))
        self.values["caption_words"].add(len(words))
        count_texts(self.words, (word[:_TEXT] for word in words))
        count_texts(self.captions, [caption[:_TEXT]])
        if len(words) < 2:
            self.totals["near_empty"] += 1
            count_texts(self.near_empty, [caption[:_TEXT]])

    def add_example(self, rank: str, example: Example, wanted: int) -> None:
        self.examples.append((rank, example))
        if len(self.examples) >= 2 * wanted + _LISTED:
            self.keep_examples(wanted)

    def keep_examples(self, wanted: int) -> None:
        self.examples = sorted(self.examples, key=lambda ranked: ranked[0])[:wanted]

    def merge(self, other: "_Found", wanted: int) -> None:
        self.damaged.update(other.damaged)
        self.totals.update(other.totals)
        for name in ("extensions", "words", "captions", "near_empty", "labels"):
            count_texts(getattr(self, name), getattr(other, name))
        for name, values in other.values.items():
            self.values[name].merge(values)
        self.examples += other.examples
        self.keep_examples(wanted)


def tars_by_split(source: UPath) -> list[tuple[str | None, UPath]]:
    """The tars of a folder of shards, or of all splits of a labelled set with their split's name.

    Raises:
        DataError: there are none.
    """
    if source.suffix == ".tar" and source.is_file():
        return [(None, source)]
    splits = sorted(path.parent for path in source.glob("*/nshards.txt"))
    folders: list[tuple[str | None, UPath]] = [(path.name, path) for path in splits]
    if not splits or any(source.glob("*.tar")):
        folders.insert(0, (None, source))
    return [(split, tar) for split, folder in folders for tar in source_tars(folder)]


def inspect(
    source: str | Path | UPath,
    *,
    page: str | Path | UPath | None = None,
    samples: int = 48,
    seed: int = 0,
    workers: int | None = None,
) -> Inspection:
    """Read every shard once, and sum up what is in it.

    Args:
        source: a folder of shards by any tool, a labelled set with splits, or one tar.
        page: an HTML file to write, with plots, tables and a contact sheet.
        samples: on the contact sheet.
        seed: of its random draw.
        workers: processes; None for one per core.

    Raises:
        DataError: there are no shards.
    """
    source = UPath(source)
    tars = tars_by_split(source)
    names = source / CLASS_NAMES
    class_names = read_lines(names) if names.exists() else []
    workers = min(workers or os.cpu_count() or 1, len(tars))
    found, splits = _Found(), Counter[str]()
    results = run_jobs(partial(_read_tar, wanted=samples, seed=seed), tars, workers)
    bar = tqdm(results, total=len(tars), unit="shard", disable=None)
    for part, (split, _) in zip(bar, tars, strict=True):
        found.merge(part, samples)
        if split is not None:
            splits[split] += part.totals["samples"]
    inspection = _sum_up(source, len(tars), found, splits, class_names)
    if page is not None:
        from clip_data.inspect_page import write_page

        write_page(UPath(page), inspection)
    return inspection


def _read_tar(job: tuple[str | None, UPath], wanted: int, seed: int) -> _Found:
    split, tar = job
    found = _Found()
    with tar.open("rb") as file:
        try:
            for key, spans in read_samples(file):
                rank = hashlib.sha256(f"{seed} {split} {tar.name} {key}".encode(errors="replace"))
                _add_sample(found, tar, key, spans, file, rank.hexdigest(), wanted)
        except tarfile.TarError as error:
            found.damaged[str(tar)] = str(error)
        found.totals["bytes"] = file.seek(0, os.SEEK_END)
    found.keep_examples(wanted)
    return found


def _add_sample(
    found: _Found,
    tar: UPath,
    key: str,
    spans: Mapping[str, Span],
    file: BinaryIO,
    rank: str,
    wanted: int,
) -> None:
    found.totals["samples"] += 1
    count_texts(found.extensions, list(spans))
    captions: list[str] = []
    if "txt" in spans:
        data = read_span(file, spans["txt"])
        text = data.decode(errors="replace")
        found.totals["not_utf8"] += text.encode() != data
        captions = [line.strip() for line in text.split("\n") if line.strip()]
    found.totals["without_caption"] += not captions
    for caption in captions:
        found.add_caption(caption)
    label = None
    if "cls" in spans:
        label = read_span(file, spans["cls"]).decode(errors="replace").strip()[:_TEXT]
        count_texts(found.labels, [label])
    image = next((span for extension, span in spans.items() if extension in IMAGES), None)
    if image is None:
        found.totals["without_image"] += 1
        return
    found.values["image_bytes"].add(image[1])
    size = _image_size(file, image)
    if size is None:
        found.totals["unreadable_images"] += 1
    else:
        for name, value in zip(("width", "height"), size, strict=True):
            found.values[name].add(value)
        found.values["aspect"].add(size[0] / size[1])
    found.add_example(rank, Example(str(tar), key, image, captions, label), wanted)


def _image_size(file: BinaryIO, span: Span) -> tuple[int, int] | None:
    """Width and height by the header; None if that is damaged."""
    offset, length = span
    for size in sorted({min(_HEADER, length), length}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(read_span(file, [offset, size]))) as image:
                    return image.size
        except Exception:  # Pillow's decoders raise nearly anything on broken bytes
            continue
    return None


def _sum_up(
    source: UPath, shards: int, found: _Found, splits: Mapping[str, int], classes: Sequence[str]
) -> Inspection:
    def common(counter: Counter[str], least: int = 1, listed: int | None = _LISTED) -> list[Count]:
        ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
        return [Count(text, count) for text, count in ranked[:listed] if count >= least]

    names = {str(number): name for number, name in enumerate(classes)}
    histograms = {name: values.histogram() for name, values in found.values.items()}
    totals = "samples bytes captions near_empty not_utf8 without_caption without_image"
    return Inspection(
        source=str(source),
        shards=shards,
        splits=dict(splits),
        damaged=found.damaged,
        unreadable_images=found.totals["unreadable_images"],
        extensions={count.text: count.count for count in common(found.extensions)},
        near_empty_captions=common(found.near_empty),
        repeated_captions=common(found.captions, least=2),
        words=common(found.words),
        classes=len(found.labels),
        labels=[replace(c, text=names.get(c.text, c.text)) for c in common(found.labels, 1, None)],
        histograms={name: each for name, each in histograms.items() if each is not None},
        examples=[
            replace(example, label=names.get(example.label or "", example.label))
            for _, example in found.examples
        ],
        **{name: found.totals[name] for name in totals.split()},
    )
