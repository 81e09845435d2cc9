"""A FAISS index over images and captions: build, query, evaluate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clip_retrieval.errors import RetrievalError

if TYPE_CHECKING:
    from clip_retrieval.build import build_index
    from clip_retrieval.evaluate import evaluate_retrieval
    from clip_retrieval.search import Index, Query, query_index

__all__ = ["Index", "Query", "RetrievalError", "build_index", "evaluate_retrieval", "query_index"]

_HOMES = {
    "Index": "search",
    "Query": "search",
    "build_index": "build",
    "evaluate_retrieval": "evaluate",
    "query_index": "search",
}


def __getattr__(name: str) -> Any:
    """Import torch and FAISS when a name needs them, not before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"clip_retrieval.{_HOMES[name]}"), name)
