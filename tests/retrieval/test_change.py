"""Append, remove, merge: the result, that it is atomic, and that a killed change is made again."""

import contextlib
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_retrieval import (
    Index,
    RetrievalError,
    append,
    build,
    build_index,
    embed_parts,
    embed_source,
    merge,
    remove,
    verify_index,
)
from clip_retrieval.layout import locked

from .conftest import killed, make_shards, training_sample, write_tar


class Killed(BaseException):
    """Like SIGKILL, nothing may catch it."""


def more_shards(directory: Path) -> Path:
    """Two shards that no other fixture has."""
    for shard, count in ((5, 12), (6, 8)):
        samples = (training_sample(shard, row) for row in range(count))
        write_tar(directory / f"{shard:05d}.tar", samples)
    return directory


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return more_shards(tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def built(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "index"
    build_index(model, shards, path, workers=0)
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "index")


def state(path: Path) -> tuple[list[str], np.ndarray, list[list[tuple[int, float]]]]:
    """Keys, rows, and what some queries find."""
    index = Index(path)
    queries = index.rows.unit(np.arange(0, len(index), 3))
    found = [[(m.row, m.similarity) for m in ms] for ms in index.search(queries, 5)]
    return index.metadata.table["key"].to_pylist(), index.rows.stored_ND.copy(), found


def assert_same(a: Path, b: Path) -> None:
    (keys_a, rows_a, found_a), (keys_b, rows_b, found_b) = state(a), state(b)
    assert keys_a == keys_b
    np.testing.assert_array_equal(rows_a, rows_b)
    assert found_a == found_b


def test_append_equals_a_build_of_all(
    index: Path, model: Path, shards: Path, more: Path, tmp_path: Path
) -> None:
    result = append(None, more, index, workers=0)
    assert (result["status"], result["images"]) == ("appended", 60)
    both = shutil.copytree(shards, tmp_path / "both")
    shutil.copytree(more, both, dirs_exist_ok=True)
    build_index(model, both, tmp_path / "all", workers=0)
    assert_same(index, tmp_path / "all")
    assert Index(index).image(45) == training_sample(5, 5)[1]["png"]
    assert verify_index(index)["faults"] == {}
    assert append(None, more, index, workers=0)["status"] == "nothing left to do"
    assert sorted(p.name for p in index.iterdir()) == [".lock", "g2", "index.json"]
    # a directory that has grown: only what is new is embedded
    write_tar(both / "00009.tar", [training_sample(9, 0)])
    assert append(model, both, tmp_path / "all", workers=0)["images"] == 61


@pytest.mark.parametrize("family", ["hnsw", "ivf-sq8", "ivf-pq", "rabitq", "on-disk"])
def test_every_family_changes(
    family: str, model: Path, large_embeddings: Path, more: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    build_index(None, large_embeddings, path, family=family)
    before = Index(path)
    assert append(model, more, path, workers=0)["images"] == 720
    gone = [f"{0:05d}{row:04d}" for row in range(0, 500, 2)]
    assert remove(path, gone)["removed"] == 250
    opened = Index(path)
    assert (len(before), len(opened), opened.facts["plan"]["family"]) == (700, 470, family)
    keys = opened.metadata.table["key"].to_pylist()
    assert not set(gone) & set(keys)
    assert keys[-1] == "000060007"
    own = opened.search(opened.rows.unit(np.arange(470)), 1)
    assert np.mean([m[0].row == row for row, m in enumerate(own)]) > 0.97
    assert verify_index(path)["faults"] == {}
    assert before.search(before.rows.unit(np.array([3])), 1)[0][0].row == 3  # still mapped


def test_a_much_larger_index_is_trained_anew(
    model: Path, large_embeddings: Path, more: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    build_index(model, more, path, workers=0)
    append(model, large_embeddings, path)
    facts = Index(path).facts
    assert (facts["trained_on"], facts["images"]) == (720, 720)
    assert facts["held_out"] == {"image": 70, "text": 70}  # the two of before among them


def test_remove(index: Path, shards: Path) -> None:
    keys = [training_sample(1, row)[0] for row in range(13)] + ["000000004", "unknown"]
    result = remove(index, keys)
    assert (result["removed"], result["images"]) == (14, 26)
    opened = Index(index)
    assert opened.row(4)["key"] == "000000005"
    assert opened.image(4) == training_sample(0, 5)[1]["png"]
    assert opened.image(25) == training_sample(2, 6)[1]["png"]
    assert [part["rows"] for part in opened.facts["parts"]] == [19, 0, 7]
    for file in index.rglob("*"):
        assert not file.is_file() or b"000010003" not in file.read_bytes()
    assert remove(index, keys)["status"] == "nothing left to do"
    # what was taken out stays out
    assert append(None, shards, index)["status"] == "nothing left to do"
    with pytest.raises(RetrievalError, match="no row would be left"):
        remove(index, opened.metadata.table["key"].to_pylist())


def test_merge(index: Path, model: Path, other_model: Path, more: Path, tmp_path: Path) -> None:
    build_index(model, more, tmp_path / "more", workers=0)
    result = merge(tmp_path / "merged", [index, tmp_path / "more"])
    assert (result["status"], result["images"]) == ("merged", 60)
    append(None, more, index, workers=0)
    assert_same(tmp_path / "merged", index)
    assert Index(tmp_path / "merged").image(59) == training_sample(6, 7)[1]["png"]
    with pytest.raises(RetrievalError, match=r"both hold 00005.tar"):
        merge(tmp_path / "x", [index, tmp_path / "more"])
    build_index(other_model, more, tmp_path / "other", workers=0)
    with pytest.raises(RetrievalError, match="another fingerprint"):
        merge(tmp_path / "x", [index, tmp_path / "other"])


def test_bad_appends(index: Path, other_model: Path, more: Path, tmp_path: Path) -> None:
    before = state(index)
    with pytest.raises(RetrievalError, match="another fingerprint"):
        append(other_model, more, index)
    with pytest.raises(RetrievalError, match="is no index"):
        append(None, more, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetrievalError, match=r"holds no .tar shard and no picture"):
        append(None, tmp_path / "empty", index)
    with locked(index), pytest.raises(RetrievalError, match="another process is changing it"):
        append(None, more, index)
    assert state(index)[0] == before[0]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (embed_parts, "write_part", 1),
        (embed_parts, "write_part", 2),
        (build, "write_rows", 1),
        (build, "tune", 1),
        (build.faiss_index, "write_index", 1),
        (build, "write_facts", 1),
        (build.os, "replace", 9),  # index.json, after embeddings.json and four files a part
    ],
)
def test_a_killed_append_is_continued(
    index: Path, built: Path, more: Path, tmp_path: Path, owner: Any, name: str, call: int
) -> None:
    whole = shutil.copytree(built, tmp_path / "whole")
    append(None, more, whole, workers=0)
    original, calls = getattr(owner, name), 0

    def killing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killing)
        with contextlib.suppress(Killed):
            append(None, more, index, workers=0)
    assert len(Index(index)) in (40, 60)  # whole, the one or the other
    append(None, more, index, workers=0)
    assert_same(index, whole)


def test_killed_at_random_moments(
    index: Path, built: Path, model: Path, shards: Path, more: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of embed and append, twenty times each; between them all is whole."""
    moments = random.Random(0)
    whole = shutil.copytree(built, tmp_path / "whole")
    append(None, more, whole, workers=0, batch_size=1)
    for _ in range(20):
        killed(lambda: append(None, more, index, workers=0, batch_size=1), moments.uniform(0, 0.5))
        assert len(Index(index)) in (40, 60)
    append(None, more, index, workers=0, batch_size=1)
    assert_same(index, whole)
    out, undisturbed = tmp_path / "embeddings", tmp_path / "undisturbed"
    for _ in range(20):
        killed(
            lambda: embed_source(model, shards, out, workers=0, batch_size=1),
            moments.uniform(0, 0.5),
        )
    for path in (out, undisturbed):
        embed_source(model, shards, path, workers=0, batch_size=1)
    for file in undisturbed.rglob("*.npy"):
        same = out / file.relative_to(undisturbed)
        np.testing.assert_array_equal(np.load(same), np.load(file))


def test_queries_during_changes(index: Path, more: Path) -> None:
    """Readers meet a whole index, whatever a writer does meanwhile."""
    done, seen, faults = threading.Event(), set[int](), list[Exception]()

    def read() -> None:
        while not done.is_set():
            try:
                opened = Index(index)
                seen.add(len(opened))
                row = len(opened) - 1
                assert opened.search(opened.vector(row)[None], 1)[0][0].row == row
            except Exception as error:
                faults.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    opened = Index(index)
    append(None, more, index, workers=0)
    assert opened.stale()
    for row in range(12):
        remove(index, [training_sample(5, row)[0]])
    done.set()
    reader.join()
    assert faults == []
    assert seen <= {40, *range(48, 61)}
    assert len(opened) == 40


def test_shards_of_the_first_build_are_known(index: Path, model: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", (3,))
    append(model, other, index, workers=0)
    assert len(Index(index)) == 43
