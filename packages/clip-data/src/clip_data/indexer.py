"""Offset indexes and counts beside tars of another tool, img2dataset's say.

With them clip-train and clip-retrieval start at once; without, every process reads the headers of
every tar it opens, each time.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from upath import UPath

from clip_data.atomic import write_text
from clip_data.errors import DataError
from clip_data.manifest import SIZES
from clip_data.selection import source_tars
from clip_data.sidecars import read_json
from clip_data.tar import build_index, index_path, read_samples, tar_size
from clip_data.workers import run_jobs


@dataclass(frozen=True)
class Indexed:
    """What `index_shards` did."""

    source: str
    shards: int
    samples: int
    written: int
    """Indexes that were not there, or of a tar of another size."""


def index_shards(source: str | Path | UPath, *, workers: int | None = None) -> Indexed:
    """Write NNNNN.index.json beside each tar of a folder, then sizes.json with the counts.

    An index that is of a tar of this size is left as it is, so that this continues where it was
    stopped.

    Raises:
        DataError: there are no tars, or damaged ones: those are named, the others have their index.
    """
    source = UPath(source)
    tars = source_tars(source)
    results = run_jobs(_index, tars, min(workers or os.cpu_count() or 1, len(tars)))
    found = list(tqdm(results, total=len(tars), unit="shard", disable=None))
    _refuse_damaged([result for result in found if isinstance(result, str)])
    counts = [result for result in found if not isinstance(result, str)]
    sizes = {tar.name: samples for tar, (samples, _) in zip(tars, counts, strict=True)}
    write_text(source / SIZES, json.dumps(sizes, indent=1))
    written = sum(new for _, new in counts)
    return Indexed(str(source), len(tars), sum(sizes.values()), written)


def _index(tar: UPath) -> tuple[int, bool] | str:
    """(samples, whether the index is new), or what is wrong."""
    with tar.open("rb") as file:
        size = tar_size(file)
        there = read_json(index_path(tar))
        if there is not None and there.get("tar_bytes") == size:
            return len(there["keys"]), False
        try:
            index = build_index(size, read_samples(file))
        except tarfile.TarError as error:
            return f"{tar}: damaged ({error})"
    if len(set(index["keys"])) < len(index["keys"]):
        return f"{tar}: a key is there twice"
    write_text(index_path(tar), json.dumps(index))
    return len(index["keys"]), True


def _refuse_damaged(damaged: Sequence[str]) -> None:
    if damaged:
        raise DataError(
            f"{len(damaged)} tars have no index, the first {damaged[0]}; get them again, or move "
            "them away, and run this again"
        )
