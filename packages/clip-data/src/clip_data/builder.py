"""From a source to a directory of shards: plan, refuse or continue, write, sum up.

While a build is under way its directory holds `manifest.json.partial`; `manifest.json` ends it.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from upath import UPath

from clip_data.atomic import PARTIAL, write_text
from clip_data.download import DownloadOptions, UrlReader
from clip_data.errors import DataError
from clip_data.images import ImageOptions
from clip_data.labelled_set import choose_class_names, choose_templates, write_set_files
from clip_data.manifest import MANIFEST, MARKER, NSHARDS, SIZES, TOOL
from clip_data.plan import Plan, survey
from clip_data.ray_engine import run_jobs_on_ray
from clip_data.shards import (
    NAMED_FAILURES,
    STATS,
    Job,
    ShardStats,
    read_stats,
    write_shard,
)
from clip_data.sources import ColumnOptions, open_source
from clip_data.tar import FORMAT
from clip_data.workers import run_jobs

log = logging.getLogger(__name__)

# Rows that may be bad where nothing else is said. Half of an old list's addresses are dead.
_MAX_ERROR_SHARE, _MAX_DOWNLOAD_ERROR_SHARE = 0.1, 0.9


@dataclass(frozen=True)
class Summary:
    """What a build has made."""

    output: str
    samples: int
    failed: int
    reasons: dict[str, int]
    """Failed rows by reason."""
    remarks: dict[str, int]
    """Oddities of good rows."""
    shards: int
    bytes: int


def build(
    source: str | Path | UPath,
    output: str | Path | UPath,
    *,
    split: str | None = None,
    columns: ColumnOptions = ColumnOptions(),  # noqa: B008 -- frozen, as the next two are
    images: ImageOptions = ImageOptions(),  # noqa: B008
    downloads: DownloadOptions = DownloadOptions(),  # noqa: B008
    source_split: str | None = None,
    classnames: Path | None = None,
    templates: Path | None = None,
    samples_per_shard: int = 10_000,
    shuffle_seed: int | None = None,
    hash_range: tuple[float, float] = (0.0, 1.0),
    workers: int | None = None,
    engine: str = "local",
    max_error_share: float | None = None,
    retry_failed: bool = False,
) -> Summary:
    """Write images with captions or labels as WebDataset shards; continue where a killed run was.

    Args:
        source: a folder of images with captions beside them, a folder per class, a CSV, TSV,
            JSONL or Parquet file with paths or addresses of images, a folder of Parquet files,
            tars, a Hugging Face data set (a folder or hf://datasets/OWNER/NAME); or the fsspec URL
            of any.
        output: the directory of the shards, or its fsspec URL; with `split`, of the set in
            CLIP_benchmark's layout.
        split: the name of the split to write, such as "train" or "test".
        columns: which columns hold what.
        images: what becomes of the images.
        downloads: how addresses are downloaded.
        source_split: which split of a Hugging Face data set to read.
        classnames: a file with a class name per line, in the order of their numbers; None takes
            the order of the set that is there, else sorts the names found.
        templates: a file with a prompt template per line, `{c}` for the class name.
        samples_per_shard: rows per shard, good or bad.
        shuffle_seed: None keeps the order of the source.
        hash_range: keep the rows whose image's name hashes into this part of [0, 1).
        workers: processes, or threads where there is but one shard; None for one per core.
        engine: "local", or "ray" for a cluster.
        max_error_share: of all rows; if more are bad, the build fails. None: 0.1, and 0.9 of a
            list of addresses.
        retry_failed: whether to try again the rows that failed in a build that is complete.

    Raises:
        DataError: no usable source, an output of another build, or too many bad rows.
        OSError: the output cannot be written.
    """
    if split is not None and not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"split {split!r}: expected the name of a folder, such as train or test")
    output = UPath(output)
    opened = open_source(str(source), columns, source_split, downloads)
    arguments = {
        "split": split,
        "columns": asdict(opened.columns),
        "images": asdict(images),
        "source_split": source_split,
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": shuffle_seed,
        "hash_range": hash_range,
    }
    plan = Plan(opened, samples_per_shard, shuffle_seed, hash_range, json.dumps(asdict(images)))
    found = survey(plan)
    if not found.rows:
        raise DataError(f"{source}: no rows; expected one for each image")
    class_names = template_lines = None
    if labelled := opened.columns.label is not None:
        ordered = opened.class_names or sorted(found.labels, key=_by_number_or_name)
        class_names = choose_class_names(output, classnames, ordered)
        template_lines = choose_templates(output, templates)
    elif classnames or templates:
        raise DataError(f"{source}: no labels, so no use for class names or templates")

    folder = output / split if split else output
    options = json.dumps([arguments, class_names])
    digests = {
        f"{number if split else f'{number:05d}'}.tar": _sha256(options + rows)
        for number, rows in enumerate(found.digests)
    }
    done = _finished_shards(folder, digests, retry_failed)
    if len(done) == len(digests) and (folder / MANIFEST).exists():
        log.info("%s is complete: nothing left to do", folder)
        return _summary(folder, [done[name] for name in digests])

    folder.mkdir(parents=True, exist_ok=True)
    if split or labelled:
        write_set_files(output, class_names, template_lines)
    _begin(folder)
    classes = {name: label for label, name in enumerate(class_names or ())}
    cores = workers or os.cpu_count() or 1
    processes = min(cores, len(digests) - len(done))
    jobs = (
        Job(
            tar=folder / name,
            keys=plan.keys(number, len(rows), split=split is not None),
            rows=rows,
            reader=opened.reader,
            images=images,
            classes=classes if labelled else None,
            digest=digests[name],
            options=_sha256(json.dumps([asdict(images), class_names])),
            threads=1 if engine == "ray" else -(-cores // processes),
        )
        for number, (name, rows) in enumerate(zip(digests, plan.slices(), strict=True))
        if name not in done
    )
    if max_error_share is None:
        downloaded = isinstance(opened.reader, UrlReader)
        max_error_share = _MAX_DOWNLOAD_ERROR_SHARE if downloaded else _MAX_ERROR_SHARE
    allowed = int(max_error_share * found.rows)
    with tqdm(total=found.rows, unit="row", disable=None) as bar:
        bar.update(sum(stats.samples + stats.failed for stats in done.values()))
        failed = sum(stats.failed for stats in done.values())
        if engine == "ray":
            results = run_jobs_on_ray(write_shard, jobs, workers)
        else:
            results = run_jobs(write_shard, jobs, processes, bar.update)
        with closing(results) as written:
            for stats in written:
                done[stats.name] = stats
                failed += stats.failed
                if engine == "ray":
                    bar.update(stats.samples + stats.failed)
                if failed > allowed:
                    break
    if failed > allowed:
        _forget_failures(folder)
        first = [failure for stats in done.values() for failure in stats.first_failures]
        raise DataError(
            f"{source}: {failed} of {found.rows} rows are bad, --max-error-share {max_error_share} "
            f"allows {allowed}: {'; '.join(first[:NAMED_FAILURES])}; repair the source or "
            "allow more, and run the same command again"
        )
    head = {"format": FORMAT, "tool": TOOL, "source": str(source), "arguments": arguments}
    return _finish(folder, head, [done[name] for name in digests])


def _by_number_or_name(label: str) -> tuple[bool, int, str]:
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _finished_shards(
    folder: UPath, digests: dict[str, str], retry_failed: bool
) -> dict[str, ShardStats]:
    """The shards, by file name, that an earlier run of this very build has finished.

    Raises:
        DataError: the folder holds shards of another build.
    """
    if not folder.exists():
        return {}
    done: dict[str, ShardStats] = {}
    for path in sorted(folder.glob(f"*{STATS}")):
        stats = read_stats(path)
        if stats is not None and stats.failed and retry_failed:
            continue
        if stats is None or stats.digest != digests.get(stats.name):
            raise DataError(
                f"{folder}: {path.name} is of another source, of other arguments or of another "
                "tool; build into another directory, or delete this one to build it anew"
            )
        tar = folder / stats.name
        if tar.is_file() and tar.stat().st_size == stats.bytes:
            done[stats.name] = stats
    ours = (folder / MARKER).exists() or (folder / MANIFEST).exists()
    for tar in folder.glob("*.tar"):
        if not ours or tar.name not in digests:
            raise DataError(f"{tar}: not of this build; build into another directory")
    return done


def _begin(folder: UPath) -> None:
    """Mark the folder as a build under way, and remove what a killed run has left half-done."""
    write_text(folder / MARKER, "")
    (folder / MANIFEST).unlink(missing_ok=True)  # shards are missing, or to be written again
    for path in folder.glob(f"*{PARTIAL}"):
        if path.name != MARKER:
            path.unlink()


def _forget_failures(folder: UPath) -> None:
    """Shards with bad rows are not done: the next run shall try those rows again."""
    for path in folder.glob(f"*{STATS}"):
        stats = read_stats(path)
        if stats is None or stats.failed:
            path.unlink()


def _finish(folder: UPath, head: dict[str, Any], shards: list[ShardStats]) -> Summary:
    """Write what describes the shards together; the manifest last, for it ends the build."""
    summary = _summary(folder, shards)
    if head["arguments"]["split"]:
        write_text(folder / NSHARDS, f"{len(shards)}\n")
    write_text(
        folder / SIZES, json.dumps({stats.name: stats.samples for stats in shards}, indent=1)
    )
    manifest = {
        **head,
        "samples": summary.samples,
        "failed": summary.failed,
        "reasons": summary.reasons,
        "bytes": summary.bytes,
        "shards": [
            {"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256}
            for s in shards
        ],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    (folder / MARKER).unlink(missing_ok=True)
    return summary


def _summary(folder: UPath, shards: list[ShardStats]) -> Summary:
    reasons, remarks = Counter[str](), Counter[str]()
    for stats in shards:
        reasons.update(stats.reasons)
        remarks.update(stats.remarks)
    return Summary(
        output=str(folder),
        samples=sum(stats.samples for stats in shards),
        failed=sum(stats.failed for stats in shards),
        reasons=dict(sorted(reasons.items())),
        remarks=dict(sorted(remarks.items())),
        shards=len(shards),
        bytes=sum(stats.bytes for stats in shards),
    )
