"""Images and captions to WebDataset shards.

Names load when they are first used: `clip-data --help` imports neither Pillow nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_data.builder import Summary, build
    from clip_data.errors import DataError
    from clip_data.verifier import Fault, Report, verify

__all__ = ["DataError", "Fault", "Report", "Summary", "build", "verify"]

_MODULES = {
    "DataError": "errors",
    "Fault": "verifier",
    "Report": "verifier",
    "Summary": "builder",
    "build": "builder",
    "verify": "verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
