"""Labelled image sets in CLIP_benchmark's layout, read without unpacking or unpickling anything.

SET/classnames.txt, SET/SPLIT/nshards.txt, SET/SPLIT/0.tar … with members KEY.webp|png|jpg|jpeg and
KEY.cls, the label as text. Where SET/dataset_type.txt says `multilabel`, KEY.npy instead: a 0 or 1
for each class. A split is opened by walking its tar headers: labels are checked before the first
image is decoded, and any loader worker can read any image by its offset.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from clip_models import read_class_names

from clip_probe.errors import ProbeError
from clip_probe.hub import fetch_split, hub_name

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


class Sample(NamedTuple):
    """Where one image lies, and its labels: one, but in a multi-label set."""

    key: str
    shard: int
    offset: int  # of the image's bytes in the tar
    size: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """One split of a labelled set: its class names and its samples in shard order."""

    source: str  # as the user named the set
    path: Path
    name: str
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    multilabel: bool = False
    names_from: str | None = None  # where class names come from, if not from the set

    @property
    def set_name(self) -> str:
        """What files and titles call the set: of a hub's snapshot the path is a commit's hash."""
        return Path(self.source).name

    @property
    def labels(self) -> list[int]:
        """The label of each sample, of a set that is not multi-label."""
        return [label for (label,) in (sample.labels for sample in self.samples)]

    @cached_property
    def content(self) -> str:
        """Identifies the images and labels by the bytes of all shards, which are read for it."""
        whole = hashlib.sha256()
        for number in range(self.samples[-1].shard + 1):
            with self._shard(number).open("rb") as shard:
                whole.update(hashlib.file_digest(shard, "sha256").digest())
        return whole.hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Identifies the split: its class names, images and labels."""
        text = json.dumps([self.content, self.class_names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, index: int) -> bytes:
        """The encoded image of one sample."""
        sample = self.samples[index]
        with self._shard(sample.shard).open("rb") as shard:
            shard.seek(sample.offset)
            return shard.read(sample.size)

    def _shard(self, number: int) -> Path:
        return self.path / self.name / f"{number}.tar"


def open_split(
    source: Path, split: str, *, class_names: str | None = None, multilabel: bool = False
) -> Split:
    """Read the class names and the tar headers of one split.

    Args:
        source: a directory; or one of CLIP_benchmark's sets on the hub, `wds/NAME` as there, or
            `hf-hub:OWNER/NAME`.
        split: its name.
        class_names: instead of the set's own, as in `read_class_names`.
        multilabel: take multi-label sets too.

    Raises:
        ProbeError: no such set or split, a missing or truncated shard, a sample without an image
            or with a label that is no class, a set of retrieval or, unless `multilabel`, of many
            labels.
        ModelError: there are no class names.
    """
    hub = None if source.is_dir() else hub_name(str(source))
    path = fetch_split(hub, split) if hub else source
    if not path.is_dir():
        raise ProbeError(f"no labelled set at {path}: expected a folder with classnames.txt")
    many = _is_multilabel(path)
    if many and not multilabel:
        raise ProbeError(
            f"{source} is a multi-label set, and this wants one label an image; "
            "`clip-probe zeroshot` takes it"
        )
    names = tuple(read_class_names(class_names or path))
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
        samples += _scan(shard, number, len(names), many)
    if not samples:
        raise ProbeError(f"split {split!r} of {path} holds no samples")
    return Split(str(source), path, split, names, tuple(samples), many, class_names)


def _is_multilabel(path: Path) -> bool:
    file = path / "dataset_type.txt"
    kind = file.read_text().strip().lower() if file.is_file() else "classification"
    if kind == "retrieval":
        raise ProbeError(f"{path} is a retrieval set: measure it with `clip-retrieval eval`")
    if kind not in ("classification", "multilabel"):
        raise ProbeError(
            f"{file}: expected classification, multilabel or retrieval, found {kind[:40]!r}"
        )
    return kind == "multilabel"


def _scan(shard: Path, number: int, classes: int, multilabel: bool) -> Iterator[Sample]:
    """The samples of one tar, by its headers."""
    try:
        with tarfile.open(shard, "r:") as tar:
            files = (member for member in tar if member.isfile())
            for key, members in groupby(files, key=lambda member: _split_name(member.name)[0]):
                parts = {_split_name(member.name)[1]: member for member in members}
                where = f"sample {key!r} of {shard}"
                data = _label_bytes(tar, parts, "npy" if multilabel else "cls", where)
                parse = _labels if multilabel else _label
                image = _image(parts, where)
                labels = parse(data, where, classes)
                yield Sample(key, number, image.offset_data, image.size, labels)
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


def _label_bytes(
    tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], extension: str, where: str
) -> bytes:
    member = parts.get(extension)
    data = tar.extractfile(member) if member else None
    if data is None:
        raise ProbeError(
            f"{where} has no .{extension}: expected a labelled set, found {_names(parts)}"
        )
    return data.read()


def _label(data: bytes, where: str, classes: int) -> tuple[int, ...]:
    text = data.strip()
    if not text.isdigit():
        raise ProbeError(f"{where}: expected a class number in .cls, found {text[:32]!r}")
    if int(text) >= classes:
        raise ProbeError(f"{where}: label {int(text)} is beyond the {classes} class names")
    return (int(text),)


def _labels(data: bytes, where: str, classes: int) -> tuple[int, ...]:
    import numpy as np

    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ProbeError(
            f"{where}: expected a plain array in .npy, found none ({error})"
        ) from error
    if array.shape != (classes,) or not np.isin(array, (0, 1)).all():
        raise ProbeError(
            f"{where}: expected a 0 or 1 in .npy for each of {classes} class names, "
            f"found an array {array.shape} of {array.dtype}"
        )
    return tuple(np.flatnonzero(array).tolist())


def _image(parts: dict[str, tarfile.TarInfo], where: str) -> tarfile.TarInfo:
    images = [parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts]
    if len(images) != 1:
        wanted = ", ".join(IMAGE_EXTENSIONS)
        raise ProbeError(f"{where}: expected one image ({wanted}), found {_names(parts)}")
    return images[0]


def _names(parts: Iterable[str]) -> str:
    return ", ".join(f".{extension}" for extension in parts)
