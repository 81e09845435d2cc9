"""Images and captions to WebDataset shards.

Names load when they are first used: `clip-data --help` imports neither Pillow nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_data.builder import Summary, build
    from clip_data.download import DownloadOptions
    from clip_data.duplicates import DedupReport, dedup
    from clip_data.errors import DataError
    from clip_data.filter import filter_shards
    from clip_data.images import ImageOptions
    from clip_data.indexer import Indexed, index_shards
    from clip_data.inspector import Inspection, inspect
    from clip_data.selection import Selected
    from clip_data.sources import ColumnOptions
    from clip_data.subsets import subset
    from clip_data.verifier import Fault, Report, verify

_MODULES = {
    "ColumnOptions": "sources",
    "DataError": "errors",
    "DedupReport": "duplicates",
    "DownloadOptions": "download",
    "Fault": "verifier",
    "ImageOptions": "images",
    "Indexed": "indexer",
    "Inspection": "inspector",
    "Report": "verifier",
    "Selected": "selection",
    "Summary": "builder",
    "build": "builder",
    "dedup": "duplicates",
    "filter_shards": "filter",
    "index_shards": "indexer",
    "inspect": "inspector",
    "subset": "subsets",
    "verify": "verifier",
}

__all__ = [
    "ColumnOptions",
    "DataError",
    "DedupReport",
    "DownloadOptions",
    "Fault",
    "ImageOptions",
    "Indexed",
    "Inspection",
    "Report",
    "Selected",
    "Summary",
    "build",
    "dedup",
    "filter_shards",
    "index_shards",
    "inspect",
    "subset",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
