"""Searching an index that is open."""

from pathlib import Path

import pytest
from clip_retrieval import Index, build_index, search

from .conftest import write_vectors


def test_folding_ends_in_a_narrow_cone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything is alike, not every row is looked at for another match."""
    build_index(None, write_vectors(tmp_path / "all", 200, spread=0.001), tmp_path / "index")
    index = Index(tmp_path / "index")
    monkeypatch.setattr(search, "_LOOKED_AT", 50)
    (match,) = index.search(index.vector(0)[None], 3, fold=0.9)[0]
    assert (match.row, len(match.duplicates)) == (0, 49)
    monkeypatch.setattr(search, "_LISTED", 5)
    (match,) = index.search(index.vector(0)[None], 3, fold=0.9)[0]
    assert len(match.duplicates) == 5
