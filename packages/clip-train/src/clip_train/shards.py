"""WebDataset shards as arrays of byte ranges: any sample is one seek away."""

import hashlib
import json
import logging
import math
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_train.errors import TrainError

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt",)
LABELS = ("cls",)

_MANY = 100  # shards to count, from which on it shows in the log

# A list parallel to the keys: where the member lies, or None where a sample has none.
Spans = list[tuple[int, int] | None]


class Shard:
    """One open tar: its keys, and where each sample's image and caption lie."""

    def __init__(self, path: Path) -> None:
        """Read `NNNNN.index.json` beside the tar if it belongs to it, else scan the tar's headers.

        Raises:
            TrainError: the file is not a tar, or truncated.
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
        """What messages call a sample: shards/00003.tar/000030012."""
        return f"{self.path.parent.name}/{self.path.name}/{self.keys[row]}"

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
    """(keys, members) from the tar's offset index; None if there is none for this very tar.

    Raises:
        TrainError: the tar is shorter than it says.
    """
    try:
        index: dict[str, Any] = json.loads(tar.with_suffix(".index.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    size = tar.stat().st_size
    if size < index.get("tar_bytes", 0):
        raise TrainError(_truncated(tar, size, index["tar_bytes"]))
    if index.get("format") != 1 or index.get("tar_bytes") != size:
        return None
    return index["keys"], index["members"]


def _truncated(tar: Path, size: int, full: int) -> str:
    return f"{tar}: truncated: {size} of {full} bytes; copy or build it again"


def _scan(tar: Path) -> tuple[list[str], dict[str, Spans]]:
    """(keys, members) from the tar's own headers, grouped as WebDataset does: up to the dot."""
    rows: dict[str, int] = {}
    found: list[tuple[int, str, tuple[int, int]]] = []
    try:
        if tar.stat().st_size % tarfile.BLOCKSIZE:  # tarfile takes half a header for the end
            raise tarfile.ReadError("truncated")
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
    """The shards to train on, one source after another."""

    shards: list[Path]
    counts: list[int]  # samples in each
    sources: list[int]  # shards in each
    weights: list[float] | None  # of each source: how often its samples are drawn; None: equally
    # of the shards' names, bytes and samples, in order, and of the sources where they have weights:
    # two runs on the same data agree
    hash: str
    manifest_hash: str | None  # sha256 of clip-data's manifest.json; None where there is none


def open_data(train_data: str, train_weights: str = "") -> Data:
    """Find and count what `--train-data` stands for, and read `--train-weights`.

    Raises:
        TrainError: a source without shards or without an image-caption pair, a shard twice or
            shorter than its manifest says, factors that are no positive numbers, or not one for
            each source.
    """
    groups = find_sources(train_data)
    weights = _read_weights(train_weights, len(groups)) if train_weights else None
    shards = [shard for group in groups for shard in group]
    counts = [count for group in groups for count in count_samples(group)]
    sources = [len(group) for group in groups]
    sizes = [shard.stat().st_size for shard in shards]
    rows = [[s.name, size, n] for s, size, n in zip(shards, sizes, counts, strict=True)]
    content = rows if weights is None else [rows, sources, weights]
    manifests = [folder / "manifest.json" for folder in dict.fromkeys(s.parent for s in shards)]
    found = {m.parent: m.read_bytes() for m in manifests if m.exists()}
    listed = {
        folder / shard["name"]: shard["bytes"]
        for folder, manifest in found.items()
        for shard in json.loads(manifest).get("shards", ())
    }
    for shard, size in zip(shards, sizes, strict=True):
        if size < listed.get(shard, 0):
            raise TrainError(_truncated(shard, size, listed[shard]))
    return Data(
        shards,
        counts,
        sources,
        weights,
        _sha256(json.dumps(content).encode()),
        _sha256(b"".join(found.values())) if found else None,
    )


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _read_weights(train_weights: str, sources: int) -> list[float]:
    option = f"--train-weights is {train_weights!r}; it must be"
    try:
        weights = [float(factor) for factor in train_weights.split("::")]
    except ValueError:
        raise TrainError(f"{option} numbers joined by '::', as 2::1") from None
    if not all(0 < weight < math.inf for weight in weights):
        raise TrainError(f"{option} numbers above 0; leave out a source that is not wanted")
    if len(weights) != sources:
        raise TrainError(f"{option} one number for each of the {sources} sources of --train-data")
    return weights


def find_shards(data: str, option: str = "--train-data") -> list[Path]:
    """The tars of all sources of `find_sources`, one source after another."""
    return [shard for source in find_sources(data, option) for shard in source]


def find_sources(data: str, option: str = "--train-data") -> list[list[Path]]:
    """The tars of each of the sources joined by '::', in name order.

    A source is a directory, a brace pattern or a glob.

    Raises:
        TrainError: a source without any, a file of a brace pattern is missing, or a shard twice.
    """
    sources = [_find_source(source, option) for source in data.split("::")]
    paths = Counter(os.path.abspath(shard) for source in sources for shard in source)
    shard, times = paths.most_common(1)[0]
    if times > 1:
        raise TrainError(f"{option}: {data} names a shard {times} times: {shard}; name it once")
    return sources


def _find_source(source: str, option: str) -> list[Path]:
    if not source:
        raise TrainError(f"{option}: a source is empty; expected a folder, or several: A::B")
    if os.path.isdir(source):
        # macOS leaves files like ._00000.tar beside those it copies
        paths = sorted(p for p in Path(source).glob("*.tar") if not p.name.startswith("."))
    else:
        paths: list[Path] = []
        for pattern in expand_braces(source):
            matches = sorted(glob(pattern))
            if not matches:
                raise TrainError(f"{option}: no file {pattern}; expected a shard (.tar)")
            paths += map(Path, matches)
    if not paths:
        raise TrainError(f"{option}: no shards (*.tar) in {source}; build them: clip-data build")
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
    """Samples in each shard of a source: from `sizes.json` beside it, else counted in the tar.

    Raises:
        TrainError: the first shard that is not empty holds no image-caption pair.
    """
    sizes: dict[Path, dict[str, int]] = {}
    for folder in {shard.parent for shard in shards}:
        file = folder / "sizes.json"
        try:
            sizes[folder] = json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise TrainError(f"{file}: not JSON ({error}); build the shards again") from error
    counts = [sizes[shard.parent].get(shard.name, 0) for shard in shards]
    unknown = [number for number, count in enumerate(counts) if not count]
    for done, number in enumerate(unknown):
        if len(unknown) > _MANY and done % _MANY == 0:
            logger.info(
                "no sizes.json: %d of %d shards counted (`clip-data index` does it once for all)",
                done,
                len(unknown),
            )
        counts[number] = len(open_shard(shards[number]))
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
