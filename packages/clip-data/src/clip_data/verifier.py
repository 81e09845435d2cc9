"""Shards read again, against what their manifest and index say and what a reader expects."""

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from upath import UPath

from clip_data.errors import DataError, RowError
from clip_data.images import ImageOptions, prepare_image
from clip_data.labelled_set import CLASS_NAMES, read_lines
from clip_data.manifest import MANIFEST, MARKER, NSHARDS, SIZES
from clip_data.sidecars import read_json
from clip_data.tar import IMAGES, Spans, build_index, index_path, read_samples, read_span, tar_size
from clip_data.workers import run_jobs

LABELS = ("cls", "npy")  # CLIP_benchmark's sets with several labels per image have .npy
LISTED_FAULTS = 100


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    fault: str
    """A fixed phrase, to be counted."""
    file: str
    key: str | None = None
    """The sample, where it is of one."""
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What verification has found."""

    output: str
    shards: int
    samples: int
    faults: dict[str, int]
    """How often each fault was found."""
    first: list[Fault]
    """The first hundred of them."""


@dataclass(frozen=True)
class _Job:
    tar: UPath
    classes: int | None
    """How many; None where the shard is of no labelled set."""


@dataclass
class _Shard:
    """What reading one tar has told."""

    tar: UPath
    sha256: str = ""
    key_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    faults: list[Fault] = field(default_factory=list[Fault])

    def add(self, fault: str, key: str | None = None, detail: str = "") -> None:
        self.faults.append(Fault(fault, str(self.tar), key, detail))


def verify(output: str | Path | UPath, *, workers: int | None = None) -> Report:
    """Read every shard of a directory, or of all splits of a labelled set, and report each fault.

    Raises:
        DataError: there are no shards.
    """
    output = UPath(output)
    splits = sorted(path.parent for path in output.glob(f"*/{NSHARDS}"))
    folders = ([output] if any(output.glob("*.tar")) else []) + splits
    if not folders:
        raise DataError(f"{output}: no shards (*.tar) and no splits; build them: clip-data build")
    names = output / CLASS_NAMES
    classes = len(read_lines(names)) if names.exists() else None
    jobs = [_Job(tar, classes) for folder in folders for tar in sorted(folder.glob("*.tar"))]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    results = run_jobs(_read_shard, jobs, workers)
    shards = list(tqdm(results, total=len(jobs), unit="shard", disable=None))
    faults = [fault for shard in shards for fault in shard.faults]
    for folder in folders:
        faults += _check_folder(folder, [shard for shard in shards if shard.tar.parent == folder])
    return Report(
        output=str(output),
        shards=len(shards),
        samples=sum(len(shard.key_hashes) for shard in shards),
        faults=dict(sorted(Counter(fault.fault for fault in faults).items())),
        first=faults[:LISTED_FAULTS],
    )


# One shard ----------------------------------------------------------------------------------------


def _read_shard(job: _Job) -> _Shard:
    shard = _Shard(job.tar)
    samples: list[Spans] = []
    with job.tar.open("rb") as file:
        shard.sha256 = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        try:
            for key, spans in read_samples(file):
                samples.append((key, spans))
                _check_sample(shard, key, spans, file, job.classes)
        except tarfile.TarError as error:
            shard.add("tar truncated or damaged", detail=str(error))
        tar_bytes = tar_size(file)
    shard.key_hashes = np.array([_key_hash(key) for key, _ in samples], np.uint64)
    index = index_path(job.tar)
    if index.exists() and read_json(index) != build_index(tar_bytes, samples):
        shard.add("index differs from tar", detail=index.name)
    return shard


def _check_sample(
    shard: _Shard, key: str, spans: dict[str, list[int]], file: BinaryIO, classes: int | None
) -> None:
    def read(extension: str) -> bytes:
        return read_span(file, spans[extension])

    if key.startswith("/") or ".." in key.split("/"):
        shard.add("unsafe name in tar", key)
    pictures = [extension for extension in spans if extension in IMAGES]
    labelled = any(extension in spans for extension in LABELS)
    if not pictures:
        shard.add("no image", key)
    for extension in pictures:
        try:
            prepare_image(read(extension), ImageOptions())
        except RowError as error:
            shard.add("undecodable image", key, f"{error.reason}: {error.detail}")
    if classes is not None and not labelled:
        shard.add("no label", key)
    if "txt" in spans:
        _check_caption(shard, key, read("txt"))
    elif not labelled:
        shard.add("no caption", key)
    if "cls" in spans:
        label = read("cls").decode("utf-8", "replace").strip()
        if not re.fullmatch(r"\d{1,9}", label) or (classes is not None and int(label) >= classes):
            shard.add("label out of range", key, f"{label[:20]!r}, of {classes} classes")


def _check_caption(shard: _Shard, key: str, data: bytes) -> None:
    try:
        if not data.decode().strip():
            shard.add("empty caption", key)
    except UnicodeDecodeError as error:
        shard.add("caption is not UTF-8", key, str(error))


# The files beside the shards ----------------------------------------------------------------------


def _check_folder(folder: UPath, shards: list[_Shard]) -> Iterator[Fault]:
    """Faults that show only when all shards of a folder are seen together."""
    found = {shard.tar.name: shard for shard in shards}
    yield from _duplicate_keys(shards)
    expected = _counted_shards(folder)
    manifest = read_json(folder / MANIFEST)
    if manifest is None and (folder / MARKER).exists():
        yield Fault("build not finished", str(folder), detail="run the same clip-data build again")
    if manifest is not None:
        entries = {entry["name"]: entry for entry in manifest["shards"]}
        expected |= set(entries)
        for name in sorted(set(found) - set(entries)):
            yield Fault("shard not in manifest", str(folder / name))
        for name in sorted(set(found) & set(entries)):
            yield from _check_entry(found[name], entries[name])
    for name in sorted(expected - set(found)):
        yield Fault("missing shard", str(folder / name))
    sizes = read_json(folder / SIZES)
    for name, count in (sizes or {}).items():
        if name in found and count != len(found[name].key_hashes):
            detail = f"{len(found[name].key_hashes)} samples, {SIZES} says {count}"
            yield Fault("wrong count", str(folder / name), detail=detail)


def _duplicate_keys(shards: list[_Shard]) -> Iterator[Fault]:
    """Keys are remembered as numbers: those of 400 million samples do not fit into memory."""
    if not shards:
        return
    hashes = np.concatenate([shard.key_hashes for shard in shards])
    values, counts = np.unique(hashes, return_counts=True)
    suspects = values[counts > 1]
    first_shard: dict[str, str] = {}
    for shard in shards:
        if not np.isin(shard.key_hashes, suspects).any():
            continue
        for key in _keys(shard.tar):
            if key in first_shard:
                yield Fault("duplicate key", str(shard.tar), key, f"also in {first_shard[key]}")
            first_shard.setdefault(key, shard.tar.name)


def _keys(tar: UPath) -> Iterator[str]:
    with tar.open("rb") as file, suppress(tarfile.TarError):
        for key, _ in read_samples(file):
            yield key


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest())


def _counted_shards(folder: UPath) -> set[str]:
    """The shards that nshards.txt promises, if there is one."""
    path = folder / NSHARDS
    if not path.exists():
        return set()
    text = path.read_text().strip()
    if not text.isdecimal():
        raise DataError(f"{path}: {text!r}; expected the number of shards")
    return {f"{number}.tar" for number in range(int(text))}


def _check_entry(shard: _Shard, entry: dict[str, Any]) -> Iterator[Fault]:
    """One tar against its line in the manifest, which promises an index too."""
    if shard.sha256 != entry["sha256"]:
        yield Fault("sha256 differs", str(shard.tar), detail=f"{MANIFEST} says {entry['sha256']}")
    if len(shard.key_hashes) != entry["samples"]:
        detail = f"{len(shard.key_hashes)} samples, {MANIFEST} says {entry['samples']}"
        yield Fault("wrong count", str(shard.tar), detail=detail)
    if not index_path(shard.tar).exists():
        yield Fault("missing index", str(index_path(shard.tar)))
