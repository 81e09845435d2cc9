"""Folders of embeddings: parts that were lost or torn, and parts read in blocks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from clip_retrieval import RetrievalError, embed_source, embeddings
from clip_retrieval.embeddings import Embeddings


@pytest.fixture(scope="module")
def embedded(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "out"
    embed_source(model, shards, path, workers=0)
    return path


@pytest.fixture
def copy(embedded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(embedded, tmp_path / "copy")


@pytest.mark.parametrize("harmed", ["img_emb/img_emb_1.npy", "text_emb/text_emb_0.npy"])
@pytest.mark.parametrize("torn", [True, False])
def test_what_was_lost_is_made_again(
    copy: Path, embedded: Path, model: Path, shards: Path, harmed: str, torn: bool
) -> None:
    if torn:
        (copy / harmed).write_bytes((copy / harmed).read_bytes()[:-100])
    else:
        (copy / harmed).unlink()
    result = embed_source(model, shards, copy, workers=0)
    assert result is not None
    assert (result["status"], result["rows"]) == ("embedded", 40)
    np.testing.assert_allclose(np.load(copy / harmed), np.load(embedded / harmed), atol=1e-3)
    result = embed_source(model, shards, copy, workers=0)
    assert result is not None
    assert result["status"] == "nothing left to do"


def test_a_torn_embeddings_json(copy: Path, model: Path, shards: Path) -> None:
    (copy / "embeddings.json").write_text('{"parts": [')
    with pytest.raises(RetrievalError, match=r"embeddings.json is not JSON .*embed again"):
        Embeddings(copy)
    with pytest.raises(RetrievalError, match=r"embeddings.json is not JSON"):
        embed_source(model, shards, copy, workers=0)


@pytest.mark.parametrize("ours", [True, False])
def test_a_part_is_read_in_blocks(copy: Path, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ours:
        (copy / "embeddings.json").unlink()
    whole = list(Embeddings(copy).chunks())
    monkeypatch.setattr(embeddings, "BLOCK_ROWS", 8)
    blocks = list(Embeddings(copy).chunks())
    assert [len(block.rows_ND) for block in blocks] == [8, 8, 4, 8, 5, 7]
    for name in ("rows_ND", "texts_ND"):
        a, b = (np.concatenate([getattr(chunk, name) for chunk in c]) for c in (whole, blocks))
        np.testing.assert_array_equal(a, b)
    keys = [[k for chunk in c for k in chunk.table["key"].to_pylist()] for c in (whole, blocks)]
    assert keys[0] == keys[1]
    file = copy / "img_emb" / "img_emb_0.npy"
    rows = np.load(file)
    rows[13] = np.nan
    np.save(file, rows)
    with pytest.raises(RetrievalError, match="row 13 has the length nan"):
        list(Embeddings(copy).chunks())
