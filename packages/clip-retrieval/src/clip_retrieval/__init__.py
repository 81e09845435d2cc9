"""A FAISS index over images and captions: build, query, evaluate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clip_retrieval.errors import RetrievalError

if TYPE_CHECKING:
    from clip_retrieval.build import build_index
    from clip_retrieval.change import append, merge, remove
    from clip_retrieval.embed_parts import embed_source
    from clip_retrieval.evaluate import evaluate_retrieval
    from clip_retrieval.query import Query, query_index
    from clip_retrieval.search import Index
    from clip_retrieval.verify import verify_index

_HOMES = {
    "Index": "search",
    "Query": "query",
    "append": "change",
    "build_index": "build",
    "embed_source": "embed_parts",
    "evaluate_retrieval": "evaluate",
    "merge": "change",
    "query_index": "query",
    "remove": "change",
    "verify_index": "verify",
}

__all__ = [
    "Index",
    "Query",
    "RetrievalError",
    "append",
    "build_index",
    "embed_source",
    "evaluate_retrieval",
    "merge",
    "query_index",
    "remove",
    "verify_index",
]


def __getattr__(name: str) -> Any:
    """Import torch and FAISS when a name needs them, not before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"clip_retrieval.{_HOMES[name]}"), name)
