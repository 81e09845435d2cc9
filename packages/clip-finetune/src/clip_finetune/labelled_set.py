"""A labelled set in CLIP_benchmark's layout, read by offset.

    SET/classnames.txt  zeroshot_classification_templates.txt  SPLIT/nshards.txt  SPLIT/0.tar …

Opening a split finds where each image lies (from the shard's index file, or one scan of the tar)
and reads the labels; images are then read one at a time, in any order, by any worker.
"""

import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from clip_models import read_class_names, read_templates

from clip_finetune.errors import FinetuneError

# N samples of the split
log = logging.getLogger(__name__)

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")

_Place = tuple[int, int]  # offset and size of a member's bytes in its tar
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """One split of a labelled set: what its classes are called and where its images lie."""

    path: Path
    split: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    shards: tuple[Path, ...]
    shard_N: _Ints
    offset_N: _Ints
    size_N: _Ints
    label_N: _Ints

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def name(self) -> str:
        """The folder's name, which names the task, its head and its column in a table."""
        return self.path.resolve().name

    def read(self, index: int) -> bytes:
        """The encoded image of sample `index`."""
        with self.shards[self.shard_N[index]].open("rb") as tar:
            tar.seek(int(self.offset_N[index]))
            return tar.read(int(self.size_N[index]))

    def fingerprint(self) -> str:
        """Which set this is: a hash of the words and of each sample's place, size and label."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.templates]).encode())
        for column in (self.shard_N, self.offset_N, self.size_N, self.label_N):
            digest.update(column.tobytes())
        return f"sha256:{digest.hexdigest()}"


def open_set(path: Path, split: str) -> LabelledSet:
    """Open one split of the labelled set at `path`.

    Raises:
        FinetuneError: no such split, no samples, a sample without image or label, a label that
            is no class.
        ModelError, OSError: classnames.txt or the templates are missing or unreadable.
    """
    if not path.is_dir():
        raise FinetuneError(f"{path}: no such labelled set; expected a folder with classnames.txt")
    class_names = tuple(read_class_names(path))
    shards = _shards(path, split)
    rows: list[tuple[int, int, int, int]] = []
    for number, tar in enumerate(shards):
        with tar.open("rb") as file:
            for key, members in _samples(tar):
                offset, size = _image(tar, key, members)
                rows.append((number, offset, size, _label(file, key, members, len(class_names))))
    if not rows:
        raise FinetuneError(f"{path / split}: no samples; build the set again with clip-data build")
    columns = np.array(rows, dtype=np.int64).T
    return LabelledSet(
        path, split, class_names, tuple(read_templates(path)), shards, *map(np.copy, columns)
    )


def _shards(path: Path, split: str) -> tuple[Path, ...]:
    count_file = path / split / "nshards.txt"
    if not count_file.is_file():
        found = sorted(file.parent.name for file in path.glob("*/nshards.txt"))
        raise FinetuneError(
            f"{path}: no split {split!r} (no {split}/nshards.txt); "
            f"found {', '.join(found) or 'no split at all'}"
        )
    text = count_file.read_text().strip()
    if not text.isdecimal():
        raise FinetuneError(f"{count_file}: {text!r}; expected the number of shards")
    return tuple(path / split / f"{number}.tar" for number in range(int(text)))


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, _Place]]]:
    """(key, {suffix: place}) of each sample in the order of the tar."""
    index_file = tar.with_suffix(".index.json")
    if index_file.is_file():
        index = json.loads(index_file.read_text())
        if index.get("format") == 1 and index.get("tar_bytes") == tar.stat().st_size:
            for row, key in enumerate(index["keys"]):
                places = {suffix: column[row] for suffix, column in index["members"].items()}
                yield key, {suffix: tuple(at) for suffix, at in places.items() if at is not None}
            return
        log.warning("%s does not fit its tar: scanning the tar instead", index_file)
    yield from _scan(tar).items()


def _scan(tar: Path) -> dict[str, dict[str, _Place]]:
    """{key: {suffix: place}} of a tar; the key ends at the first dot, as in WebDataset."""
    samples: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    place = (member.offset_data, member.size)
                    samples.setdefault(folder + slash + stem, {})[suffix.lower()] = place
    except tarfile.TarError as error:
        raise FinetuneError(f"{tar}: not a whole tar file ({error}); build it again") from error
    return samples


def _image(tar: Path, key: str, members: dict[str, _Place]) -> _Place:
    for suffix in _IMAGE_SUFFIXES:
        if suffix in members:
            return members[suffix]
    raise FinetuneError(
        f"{tar}: sample {key} has no image; found {', '.join(sorted(members))}, "
        f"expected one of {', '.join(_IMAGE_SUFFIXES)}"
    )


def _label(tar: IO[bytes], key: str, members: dict[str, _Place], classes: int) -> int:
    if "cls" not in members:
        raise FinetuneError(
            f"{tar.name}: sample {key} has no .cls label; expected a set for classification"
        )
    offset, size = members["cls"]
    tar.seek(offset)
    text = tar.read(size).decode("utf-8", errors="replace").strip()
    if not (text.isdecimal() and int(text) < classes):
        raise FinetuneError(
            f"{tar.name}: sample {key} has the label {text!r}; "
            f"expected a number below {classes}, the lines of classnames.txt"
        )
    return int(text)
