"""Shards: which tars belong to a set, and where each sample's members lie inside them.

Every member is found as (offset, size) in its tar, so a picture can later be read by itself.
Offsets come from the sidecar index clip-data writes, or from the tar's own headers.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_retrieval.errors import RetrievalError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

Span = tuple[int, int]  # offset of the member's data in the tar, size in bytes


@dataclass(frozen=True)
class Sample:
    """A key and where its members lie, by lower-case extension."""

    key: str
    members: dict[str, Span]

    @property
    def image_extension(self) -> str:
        """Of the picture; "" where the sample has none."""
        return next((e for e in IMAGE_EXTENSIONS if e in self.members), "")

    @property
    def image(self) -> Span | None:
        """The picture, or None where the sample has none."""
        return self.members.get(self.image_extension)


def list_shards(directory: Path) -> list[Path]:
    """The tars of a directory of training shards, or of a split in CLIP_benchmark's layout.

    Raises:
        RetrievalError: there is no tar, or one that `nshards.txt` counts is missing.
    """
    if not directory.is_dir():
        raise RetrievalError(f"{directory} is not a directory; expected one that holds .tar shards")
    counted = directory / "nshards.txt"
    if counted.is_file():
        text = counted.read_text(encoding="utf-8").strip()
        if not text.isdecimal():
            raise RetrievalError(f"{counted} holds {text[:40]!r}; expected the number of shards")
        shards = [directory / f"{i}.tar" for i in range(int(text))]
        for shard in shards:
            if not shard.is_file():
                raise RetrievalError(f"{shard} is missing; {counted} counts {len(shards)} shards")
    else:
        shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise RetrievalError(
            f"{directory} holds no .tar shard; give a directory of shards "
            "(`clip-data build` makes one) or one split of a set, like SET/test"
        )
    return shards


def read_samples(shard: Path) -> Iterator[Sample]:
    """The samples of a shard, in its order, without reading their contents.

    Raises:
        RetrievalError: the tar is truncated or is not an uncompressed tar.
    """
    index = _sidecar(shard)
    if index is None:
        yield from _scan(shard)
        return
    for row, key in enumerate(index["keys"]):
        spans = {extension: column[row] for extension, column in index["members"].items()}
        yield Sample(key, {extension: (s[0], s[1]) for extension, s in spans.items() if s})


def _sidecar(shard: Path) -> dict[str, Any] | None:
    """clip-data's `NNNNN.index.json`, unless it is of another tar than the one that is here."""
    path = shard.with_suffix(".index.json")
    if not path.is_file():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:  # torn: the tar itself says the same
        return None
    fits = index.get("format") == 1 and index.get("tar_bytes") == shard.stat().st_size
    return index if fits else None


def _scan(shard: Path) -> Iterator[Sample]:
    key, members = "", dict[str, Span]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not info.isfile() or not stem or not extension:
                    continue
                if (next_key := f"{folder}/{stem}" if folder else stem) != key:
                    if members:
                        yield Sample(key, members)
                    key, members = next_key, {}
                members[extension.lower()] = (info.offset_data, info.size)
    except tarfile.TarError as error:
        raise RetrievalError(f"{shard} is not a whole uncompressed tar: {error}") from error
    if members:
        yield Sample(key, members)
