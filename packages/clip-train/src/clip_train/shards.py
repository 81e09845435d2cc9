"""WebDataset shards as arrays of byte ranges: any sample is one seek away."""

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_train.errors import TrainError

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt",)
LABELS = ("cls",)

# A list parallel to the keys: where the member lies, or None where a sample has none.
Spans = list[tuple[int, int] | None]


class Shard:
    """One open tar: its keys, and where each sample's image and caption lie."""

    def __init__(self, path: Path) -> None:
        """Read `NNNNN.index.json` beside the tar if it belongs to it, else scan the tar's headers.

        Raises:
            TrainError: the file is not a tar.
        """
        self.path = path
        self.keys, members = _read_sidecar(path) or _scan(path)
        self.images = _spans(members, IMAGES, len(self.keys))
        self.captions = _spans(members, CAPTIONS, len(self.keys))
        self.labels = _spans(members, LABELS, len(self.keys))
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.keys)

    def pairs(self) -> int:
        """Samples with both an image and a caption."""
        return int(((self.images[:, 0] >= 0) & (self.captions[:, 0] >= 0)).sum())

    def name(self, row: int) -> str:
        """What messages call a sample: 00003.tar/000030012."""
        return f"{self.path.name}/{self.keys[row]}"

    def image(self, row: int) -> bytes:
        """The encoded image. Raises OSError, or TrainError: the sample has none."""
        return self._read(self.images, row, IMAGES)

    def caption(self, row: int) -> bytes:
        """The caption's UTF-8. Raises OSError, or TrainError: the sample has none."""
        return self._read(self.captions, row, CAPTIONS)

    def label(self, row: int) -> int:
        """The class number. Raises OSError, or TrainError: the sample has none."""
        text = self._read(self.labels, row, LABELS)
        try:
            return int(text)
        except ValueError:
            raise TrainError(f"its .cls holds {text[:40]!r}; expected an integer") from None

    def _read(self, spans: NDArray[np.int64], row: int, names: tuple[str, ...]) -> bytes:
        offset, size = int(spans[row, 0]), int(spans[row, 1])
        if offset < 0:
            raise TrainError(f"it has no {', '.join('.' + name for name in names)} member")
        return os.pread(self._file.fileno(), size, offset)  # forked loaders share no position


# A batch may span two windows of at most 64 shards (order.py): two windows stay open per process.
open_shard = lru_cache(maxsize=128)(Shard)


def _spans(members: dict[str, Spans], names: tuple[str, ...], n: int) -> NDArray[np.int64]:
    """[n, 2] offset and size of the first of `names` each sample has; -1 where it has none."""
    spans = np.full((n, 2), -1, np.int64)
    for name in reversed(names):
        for row, span in enumerate(members.get(name, ())):
            if span is not None:
                spans[row] = span
    return spans


def _read_sidecar(tar: Path) -> tuple[list[str], dict[str, Spans]] | None:
    """(keys, members) from the tar's offset index; None if there is none for this very tar."""
    try:
        index: dict[str, Any] = json.loads(tar.with_suffix(".index.json").read_text())
    except FileNotFoundError:
        return None
    if index.get("format") != 1 or index.get("tar_bytes") != tar.stat().st_size:
        return None
    return index["keys"], index["members"]


def _scan(tar: Path) -> tuple[list[str], dict[str, Spans]]:
    """(keys, members) from the tar's own headers, grouped as WebDataset does: up to the dot."""
    rows: dict[str, int] = {}
    found: list[tuple[int, str, tuple[int, int]]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                base, dot, extension = file.partition(".")
                if member.isfile() and dot and base:
                    row = rows.setdefault(f"{folder}/{base}" if folder else base, len(rows))
                    found.append((row, extension.lower(), (member.offset_data, member.size)))
    except tarfile.TarError as error:
        raise TrainError(f"{tar}: not a readable tar ({error}); build it again") from error
    members: dict[str, Spans] = {}
    for row, extension, span in found:
        members.setdefault(extension, [None] * len(rows))[row] = span
    return list(rows), members


@dataclass(frozen=True)
class Data:
    """The shards to train on."""

    shards: list[Path]
    counts: list[int]  # samples in each
    hash: str  # of the shards' names, bytes and samples, in order: two runs on the same data agree
    manifest_hash: str | None  # sha256 of clip-data's manifest.json; None where there is none


def open_data(train_data: str) -> Data:
    """Find and count what `--train-data` stands for.

    Raises:
        TrainError: no shards, or no image-caption pair in them.
    """
    shards = find_shards(train_data)
    counts = count_samples(shards)
    rows = [[s.name, s.stat().st_size, n] for s, n in zip(shards, counts, strict=True)]
    manifest = shards[0].parent / "manifest.json"
    return Data(
        shards,
        counts,
        _sha256(json.dumps(rows).encode()),
        _sha256(manifest.read_bytes()) if manifest.exists() else None,
    )


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def find_shards(train_data: str) -> list[Path]:
    """The tars that a directory, a brace pattern or a glob stands for, in name order.

    Raises:
        TrainError: none, or a file of a brace pattern is missing.
    """
    if os.path.isdir(train_data):
        paths = sorted(Path(train_data).glob("*.tar"))
    else:
        paths: list[Path] = []
        for pattern in expand_braces(train_data):
            matches = sorted(glob(pattern))
            if not matches:
                raise TrainError(f"--train-data: no file {pattern}; expected a shard (.tar)")
            paths += map(Path, matches)
    if not paths:
        raise TrainError(
            f"--train-data: no shards (*.tar) in {train_data}; build them: clip-data build"
        )
    if len(set(paths)) < len(paths):
        raise TrainError(f"--train-data: {train_data} names a shard twice")
    return paths


def expand_braces(pattern: str) -> list[str]:
    """The shell's `{000..041}` and `{a,b}` (not nested): every string the pattern stands for."""
    choices: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        inner = part[1:-1]
        if bounds := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = bounds.groups()
            width = len(first) if first.startswith("0") else 0
            choices.append([f"{i:0{width}}" for i in range(int(first), int(last) + 1)])
        else:
            choices.append(inner.split(",") if part.startswith("{") and "," in inner else [part])
    return ["".join(parts) for parts in product(*choices)]


def count_samples(shards: list[Path]) -> list[int]:
    """Samples in each shard: from `sizes.json` beside it, else counted in the tar.

    Raises:
        TrainError: the first shard that is not empty holds no image-caption pair.
    """
    sizes: dict[Path, dict[str, int]] = {}
    counts: list[int] = []
    for shard in shards:
        folder = shard.parent
        if folder not in sizes:
            file = folder / "sizes.json"
            sizes[folder] = json.loads(file.read_text()) if file.exists() else {}
        counts.append(sizes[folder].get(shard.name) or len(open_shard(shard)))
    filled = next((s for s, count in zip(shards, counts, strict=True) if count), None)
    if filled is None:
        raise TrainError(
            f"{shards[0].parent}: the shards are empty; build them again: clip-data build"
        )
    if not open_shard(filled).pairs():
        raise TrainError(
            f"{filled}: no image-caption pair; expected KEY.{{{','.join(IMAGES)}}} and KEY.txt"
        )
    return counts
