"""Labelled image sets in CLIP_benchmark's layout, read without unpacking or unpickling anything.

SET/classnames.txt, SET/SPLIT/nshards.txt, SET/SPLIT/0.tar … with members KEY.cls (the label as
text) and KEY.webp|png|jpg|jpeg. A split is opened by walking its tar headers: labels are checked
before the first image is decoded, and any loader worker can read any image by its offset.
"""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from clip_models import read_class_names

from clip_probe.errors import ProbeError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


class Sample(NamedTuple):
    """Where one image lies, and its label."""

    key: str
    shard: int
    offset: int  # of the image's bytes in the tar
    size: int
    label: int


@dataclass(frozen=True)
class Split:
    """One split of a labelled set: its class names and its samples in shard order."""

    path: Path
    name: str
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]

    @property
    def labels(self) -> list[int]:
        """The label of each sample."""
        return [sample.label for sample in self.samples]

    @property
    def digest(self) -> str:
        """Identifies the split's content by class names, keys, sizes and labels (not pixels)."""
        lines = [*self.class_names, *(f"{s.key} {s.size} {s.label}" for s in self.samples)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def read(self, index: int) -> bytes:
        """The encoded image of one sample."""
        sample = self.samples[index]
        with open(self.path / self.name / f"{sample.shard}.tar", "rb") as shard:
            shard.seek(sample.offset)
            return shard.read(sample.size)


def open_split(path: Path, split: str) -> Split:
    """Read the class names and the tar headers of one split.

    Raises:
        ProbeError: no such set or split, a missing or truncated shard, a sample without an image
            or with a label that is no class.
        ModelError: classnames.txt is missing.
    """
    if not path.is_dir():
        raise ProbeError(f"no labelled set at {path}: expected a folder with classnames.txt")
    class_names = tuple(read_class_names(path))
    count_file = path / split / "nshards.txt"
    if not count_file.is_file():
        found = sorted(file.parent.name for file in path.glob("*/nshards.txt"))
        raise ProbeError(
            f"no split {split!r} in {path} (no {split}/nshards.txt): "
            f"found {', '.join(found) or 'none'}"
        )
    text = count_file.read_text().strip()
    if not text.isdecimal():
        raise ProbeError(f"{count_file}: expected the number of shards, found {text[:40]!r}")

    samples: list[Sample] = []
    for number in range(int(text)):
        shard = path / split / f"{number}.tar"
        if not shard.is_file():
            raise ProbeError(f"{shard} is missing: {count_file} promises {text} shards")
        samples += _scan(shard, number, len(class_names))
    if not samples:
        raise ProbeError(f"split {split!r} of {path} holds no samples")
    return Split(path, split, class_names, tuple(samples))


def _scan(shard: Path, number: int, classes: int) -> Iterator[Sample]:
    """The samples of one tar, by its headers."""
    try:
        with tarfile.open(shard, "r:") as tar:
            files = (member for member in tar if member.isfile())
            for key, members in groupby(files, key=lambda member: _split_name(member.name)[0]):
                parts = {_split_name(member.name)[1]: member for member in members}
                label = _label(tar, parts, f"sample {key!r} of {shard}", classes)
                image = _image(parts, f"sample {key!r} of {shard}")
                yield Sample(key, number, image.offset_data, image.size, label)
        with open(shard, "rb") as file:
            file.seek(-tarfile.BLOCKSIZE, 2)
            if any(file.read()):
                raise tarfile.ReadError("no end-of-archive block")
    except tarfile.TarError as error:
        raise ProbeError(
            f"{shard} is truncated or no tar ({error}): copy or build it again"
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: split at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def _label(
    tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], where: str, classes: int
) -> int:
    member = parts.get("cls")
    data = tar.extractfile(member) if member else None
    if data is None:
        raise ProbeError(f"{where} has no .cls: expected a labelled set, found {_names(parts)}")
    text = data.read(32).strip()
    if not text.isdigit():
        raise ProbeError(f"{where}: expected a class number in .cls, found {text!r}")
    if int(text) >= classes:
        raise ProbeError(
            f"{where}: label {int(text)} is beyond the {classes} names of classnames.txt"
        )
    return int(text)


def _image(parts: dict[str, tarfile.TarInfo], where: str) -> tarfile.TarInfo:
    images = [parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts]
    if len(images) != 1:
        wanted = ", ".join(IMAGE_EXTENSIONS)
        raise ProbeError(f"{where}: expected one image ({wanted}), found {_names(parts)}")
    return images[0]


def _names(parts: Iterable[str]) -> str:
    return ", ".join(f".{extension}" for extension in parts)
