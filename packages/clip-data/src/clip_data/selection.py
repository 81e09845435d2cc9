"""The samples that stay, as shards of their own: what subset, filter and dedup write.

A shard of which all stays is linked; one of which nothing stays is left out; any other is written
anew, its members' bytes and order as they were, with its index, parquet rows and stats.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from upath import UPath

from clip_data.atomic import PARTIAL, whole_file, write_text
from clip_data.errors import DataError
from clip_data.labelled_set import CLASS_NAMES, DATASET_TYPE, TEMPLATES
from clip_data.manifest import MANIFEST, MARKER, NSHARDS, SIZES, TOOL
from clip_data.selected_shard import Job, write_selected
from clip_data.shards import ShardStats
from clip_data.sidecars import read_json
from clip_data.tar import FORMAT
from clip_data.workers import run_jobs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """What a selection has written."""

    output: str
    samples: int
    dropped: int
    """Samples of the source that did not stay."""
    shards: int
    linked: int
    """Shards of which all stayed; copied where a link cannot be made."""
    rewritten: int
    bytes: int


def source_tars(source: UPath) -> list[UPath]:
    """The tars of a folder of shards, in the order of their numbers. Raises DataError: none."""
    # macOS leaves files like ._00000.tar beside those it copies
    found = [tar for tar in source.glob("*.tar") if not tar.name.startswith(".")]
    tars = sorted(found, key=lambda tar: (len(tar.name), tar.name))
    if not tars:
        raise DataError(
            f"{source}: no shards (*.tar); expected the folder that holds them, of a labelled set "
            "that of a split"
        )
    return tars


def write_selection(
    source: UPath,
    output: UPath,
    keep: Iterable[tuple[UPath, frozenset[str] | None]],
    *,
    arguments: dict[str, Any],
    workers: int | None = None,
) -> Selected:
    """Write the samples that stay; continue where a killed run was.

    Args:
        source: a folder of shards, with sidecars or without.
        output: the folder of the new shards; of a split, beside it what all splits of a set share.
        keep: for each tar of `source`, in order, the keys that stay, all of them of that tar;
            None for all.
        arguments: of the selection, for the manifest; of JSON.
        workers: processes; None for one per core.

    Raises:
        DataError: nothing stays, a shard is damaged, or `output` holds something else.
        OSError: the output cannot be written.
    """
    if str(source.resolve()) == str(output.resolve()):
        raise DataError(f"{output}: the source itself; write to another directory")
    tars, manifest = source_tars(source), source / MANIFEST
    known = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None
    head = {
        "format": FORMAT,
        "tool": TOOL,
        "source": str(source),
        "source_manifest": known,
        "arguments": arguments,
    }
    _refuse_another(output, head)
    workers = min(workers or os.cpu_count() or 1, len(tars))
    with closing(run_jobs(write_selected, _jobs(source, output, keep, head), workers)) as results:
        done = list(tqdm(results, total=len(tars), unit="shard", disable=None))
    shards = [shard.stats for shard in done if shard.stats is not None]
    if not shards:
        raise DataError(f"{source}: no sample stays, so nothing is written")
    if not any(shard.written for shard in done):
        log.info("%s is complete: nothing left to do", output)
    linked = sum(shard.stats is not None and not shard.dropped for shard in done)
    selected = Selected(
        output=str(output),
        samples=sum(stats.samples for stats in shards),
        dropped=sum(shard.dropped for shard in done),
        shards=len(shards),
        linked=linked,
        rewritten=len(shards) - linked,
        bytes=sum(stats.bytes for stats in shards),
    )
    _finish(source, output, head, selected, shards)
    return selected


def _refuse_another(output: UPath, head: dict[str, Any]) -> None:
    """Raises DataError: the output holds anything but this very selection."""
    there = [
        found for name in (MANIFEST, MARKER) if (found := read_json(output / name)) is not None
    ]
    wanted = json.loads(json.dumps(head))
    if there:
        same = all(there[0].get(what) == wanted[what] for what in ("source_manifest", "arguments"))
    else:
        same = not output.exists() or not any(output.glob("*.tar"))
    if not same:
        raise DataError(
            f"{output}: holds shards of another source, or of another command; write to another "
            "directory, or delete this one to write it anew"
        )


def _jobs(
    source: UPath,
    output: UPath,
    keep: Iterable[tuple[UPath, frozenset[str] | None]],
    head: dict[str, Any],
) -> Iterator[Job]:
    numbered, staying = (source / NSHARDS).exists(), 0
    for tar, keys in keep:
        if keys is not None and not keys:
            yield Job(tar, keys, None)
            continue
        if not staying:
            _begin(source, output, head)
        yield Job(tar, keys, output / (f"{staying}.tar" if numbered else tar.name))
        staying += 1


def _begin(source: UPath, output: UPath, head: dict[str, Any]) -> None:
    """Mark the output as under way, unless it was complete; copy what the splits of a set share.

    Raises:
        DataError: the output's set is another one.
    """
    folders = {source: output}
    if (source / NSHARDS).exists():
        folders[source.parent] = output.parent
    files = {
        there / name: (here / name).read_bytes()
        for here, there in folders.items()
        for name in (CLASS_NAMES, TEMPLATES, DATASET_TYPE)
        if (here / name).exists()
    }
    for path, data in files.items():
        if path.exists() and path.read_bytes() != data:
            raise DataError(f"{path}: differs from the source's; write the split into another set")
    output.mkdir(parents=True, exist_ok=True)
    if not (output / MANIFEST).exists():
        write_text(output / MARKER, json.dumps(head))
    for path in output.glob(f"*{PARTIAL}"):  # half-done files of a killed run
        if path.name != MARKER:
            path.unlink()
    for path, data in files.items():
        if not path.exists():
            with whole_file(path) as file:
                file.write(data)


def _finish(
    source: UPath,
    output: UPath,
    head: dict[str, Any],
    selected: Selected,
    shards: list[ShardStats],
) -> None:
    """Write what describes the shards together, where it is not there; the manifest last."""
    manifest = {
        **head,
        "samples": selected.samples,
        "dropped": selected.dropped,
        "bytes": selected.bytes,
        "shards": [
            {"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256}
            for s in shards
        ],
    }
    files = {
        SIZES: json.dumps({stats.name: stats.samples for stats in shards}, indent=1),
        MANIFEST: json.dumps(manifest, indent=1),
    }
    if (source / NSHARDS).exists():
        files = {NSHARDS: f"{len(shards)}\n", **files}
    for name, text in files.items():
        path = output / name
        if not path.exists() or path.read_bytes() != text.encode():
            write_text(path, text)
    (output / MARKER).unlink(missing_ok=True)
