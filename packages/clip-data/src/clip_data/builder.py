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
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_data.atomic import PARTIAL, write_text
from clip_data.errors import DataError
from clip_data.labelled_set import choose_class_names, choose_templates, write_set_files
from clip_data.plan import Plan, survey
from clip_data.shards import (
    FORMAT,
    NAMED_FAILURES,
    STATS,
    Job,
    ShardStats,
    read_stats,
    write_shard,
)
from clip_data.sources import open_source
from clip_data.workers import run_jobs

log = logging.getLogger(__name__)

TOOL = f"clip-data {version('clip-data')}"
MANIFEST = "manifest.json"
MARKER = MANIFEST + PARTIAL
SIZES = "sizes.json"


@dataclass(frozen=True)
class Summary:
    """What a build has made."""

    output: str
    samples: int
    failed: int
    reasons: dict[str, int]
    """Failed rows by reason."""
    shards: int
    bytes: int


def build(
    source: Path,
    output: Path,
    *,
    split: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    classnames: Path | None = None,
    templates: Path | None = None,
    samples_per_shard: int = 10_000,
    shuffle_seed: int | None = None,
    workers: int | None = None,
    max_error_share: float = 0.1,
) -> Summary:
    """Write images with captions or labels as WebDataset shards; continue where a killed run was.

    Args:
        source: a folder of images with captions beside them, a folder per class, or a CSV, TSV,
            JSONL or Parquet file whose image paths are relative to it.
        output: the directory of the shards; with `split`, of the set in CLIP_benchmark's layout.
        split: the name of the split to write, such as "train" or "test".
        image_column: the column of image paths.
        caption_column: a caption, or a list of them; None takes `caption` where there is one.
        label_column: the column of class names; None where there are none.
        classnames: a file with a class name per line, in the order of their numbers; None takes
            the order of the set that is there, else sorts the names found.
        templates: a file with a prompt template per line, `{c}` for the class name.
        samples_per_shard: rows per shard, good or bad.
        shuffle_seed: None keeps the order of the source.
        workers: processes; None for one per core.
        max_error_share: of all rows; if more are bad, the build fails.

    Raises:
        DataError: no usable source, an output of another build, or too many bad rows.
        OSError: the output cannot be written.
    """
    if split is not None and not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"split {split!r}: expected the name of a folder, such as train or test")
    plan = Plan(
        open_source(source, image_column, caption_column, label_column),
        samples_per_shard,
        shuffle_seed,
    )
    columns = plan.source.columns
    labelled = columns.label is not None
    found = survey(plan)
    if not found.rows:
        raise DataError(f"{source}: no rows; expected one for each image")
    class_names = template_lines = None
    if labelled:
        class_names = choose_class_names(output, classnames, found.labels)
        template_lines = choose_templates(output, templates)
    elif classnames or templates:
        raise DataError(f"{source}: no labels, so no use for class names or templates")

    folder = output / split if split else output
    arguments = {
        "split": split,
        "image_column": image_column,
        "caption_column": columns.caption,
        "label_column": label_column,
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": shuffle_seed,
    }
    options = json.dumps([arguments, class_names])
    digests = {
        f"{number if split else f'{number:05d}'}.tar": _sha256(options + rows)
        for number, rows in enumerate(found.digests)
    }
    done = _finished_shards(folder, digests)
    if len(done) == len(digests) and (folder / MANIFEST).exists():
        log.info("%s is complete: nothing left to do", folder)
        return _summary(folder, [done[name] for name in digests])

    folder.mkdir(parents=True, exist_ok=True)
    if split or labelled:
        write_set_files(output, class_names, template_lines)
    _begin(folder)
    classes = {name: label for label, name in enumerate(class_names or ())}
    jobs = (
        Job(
            tar=folder / name,
            keys=plan.keys(number, len(rows), split=split is not None),
            rows=rows,
            root=str(plan.source.root),
            classes=classes if labelled else None,
            digest=digests[name],
        )
        for number, (name, rows) in enumerate(zip(digests, plan.slices(), strict=True))
        if name not in done
    )
    workers = min(workers or os.cpu_count() or 1, len(digests) - len(done))
    failed, allowed = 0, max_error_share * found.rows
    with (
        tqdm(total=found.rows, unit="row", disable=None) as bar,
        closing(run_jobs(write_shard, jobs, workers)) as written,
    ):
        for stats in chain(list(done.values()), written):
            done[stats.name] = stats
            bar.update(stats.samples + stats.failed)
            failed += stats.failed
            if failed > allowed:
                break
    if failed > allowed:
        _forget_failures(folder)
        first = [failure for stats in done.values() for failure in stats.first_failures]
        raise DataError(
            f"{source}: {failed} of {found.rows} rows are bad, --max-error-share {max_error_share} "
            f"allows {int(allowed)}: {'; '.join(first[:NAMED_FAILURES])}; repair the source or "
            "allow more, and run the same command again"
        )
    head = {"format": FORMAT, "tool": TOOL, "source": str(source), "arguments": arguments}
    return _finish(folder, head, [done[name] for name in digests])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _finished_shards(folder: Path, digests: dict[str, str]) -> dict[str, ShardStats]:
    """The shards, by file name, that an earlier run of this very build has finished.

    Raises:
        DataError: the folder holds shards of another build.
    """
    done: dict[str, ShardStats] = {}
    for path in sorted(folder.glob(f"*{STATS}")):
        stats = read_stats(path)
        if stats.digest != digests.get(stats.name):
            raise DataError(
                f"{folder}: {stats.name} was built from another source or with other arguments; "
                "build into another directory, or delete this one to build it anew"
            )
        tar = folder / stats.name
        if tar.is_file() and tar.stat().st_size == stats.bytes:
            done[stats.name] = stats
    ours = (folder / MARKER).exists() or (folder / MANIFEST).exists()
    for tar in folder.glob("*.tar"):
        if not ours or tar.name not in digests:
            raise DataError(f"{tar}: not of this build; build into another directory")
    return done


def _begin(folder: Path) -> None:
    """Mark the folder as a build under way, and remove what a killed run has left half-done."""
    (folder / MARKER).touch()
    (folder / MANIFEST).unlink(missing_ok=True)  # a finished shard has been lost since
    for path in folder.glob(f"*{PARTIAL}"):
        if path.name != MARKER:
            path.unlink()


def _forget_failures(folder: Path) -> None:
    """Shards with bad rows are not done: the next run shall try the rows again."""
    for path in folder.glob(f"*{STATS}"):
        if read_stats(path).failed:
            path.unlink()


def _finish(folder: Path, head: dict[str, Any], shards: list[ShardStats]) -> Summary:
    """Write what describes the shards together; the manifest last, for it ends the build."""
    summary = _summary(folder, shards)
    if head["arguments"]["split"]:
        write_text(folder / "nshards.txt", f"{len(shards)}\n")
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
    return summary


def _summary(folder: Path, shards: list[ShardStats]) -> Summary:
    reasons = Counter[str]()
    for stats in shards:
        reasons.update(stats.reasons)
    return Summary(
        output=str(folder),
        samples=sum(stats.samples for stats in shards),
        failed=sum(stats.failed for stats in shards),
        reasons=dict(sorted(reasons.items())),
        shards=len(shards),
        bytes=sum(stats.bytes for stats in shards),
    )
