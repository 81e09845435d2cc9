"""The samples that stay, as shards of their own: what subset, filter and dedup write.

A shard of which all stays is linked; one of which nothing stays is left out; any other is written
anew, its members' bytes and order as they were, with its index, parquet rows and stats.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from upath import UPath

from clip_data.errors import DataError
from clip_data.tar import Spans


@dataclass(frozen=True)
class Selected:
    """What a selection has written."""

    output: str
    samples: int
    dropped: int
    """Samples of the source that did not stay."""
    shards: int
    linked: int
    """Shards of which all stayed."""
    rewritten: int
    bytes: int


def source_tars(source: UPath) -> list[UPath]:
    """The tars of a folder of shards, in the order of their numbers. Raises DataError: none."""
    tars = sorted(source.glob("*.tar"), key=lambda tar: (len(tar.name), tar.name))
    if not tars:
        raise DataError(
            f"{source}: no shards (*.tar); expected the folder that holds them, of a labelled set "
            "that of a split"
        )
    return tars


def read_keys(tar: UPath) -> list[str]:
    """The keys of a shard: by its index, else the successes of its parquet, else the tar."""
    raise NotImplementedError


def read_members(tar: UPath, file: BinaryIO) -> list[Spans]:
    """The samples of an open tar: by its index if there is one, else by its headers."""
    raise NotImplementedError


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
        output: the folder of the new shards.
        keep: for each tar of `source`, in order, the keys that stay, all of them of that tar;
            None for all.
        arguments: of the selection, for the manifest; of JSON.
        workers: processes; None for one per core.

    Raises:
        DataError: nothing stays, a shard is damaged, or `output` holds something else.
    """
    raise NotImplementedError
