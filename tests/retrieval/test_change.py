"""Append, remove, merge: the result, that it is atomic, and that a killed change is made again."""

import contextlib
import shutil
import threading
from dataclasses import replace
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
from clip_retrieval.index import Knob
from clip_retrieval.layout import locked
from clip_retrieval.tune import Queries

from .conftest import (
    killed_twenty_times,
    make_shards,
    picture,
    training_sample,
    write_tar,
    write_vectors,
)


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


def test_the_tuning_outlasts_small_appends(tmp_path: Path) -> None:
    """The rows held out before are asked again where few are new; one row is new in the first."""
    path = tmp_path / "index"
    build_index(None, write_vectors(tmp_path / "all", 700), path, family="ivf-pq")
    for count in (1, 12, 60):
        append(None, write_vectors(tmp_path / str(count), count, seed=count), path)
        facts = Index(path).facts
        assert facts["trained_on"] == 700
        assert facts["held_out"]["image"] >= 70
        assert facts["search"]["value"] < facts["plan"]["largest"]
        assert 0.9 < facts["recall@10"]["image"] <= 1


def test_a_row_does_not_count_as_found_by_itself(tmp_path: Path) -> None:
    build_index(None, write_vectors(tmp_path / "all", 700), tmp_path / "index", family="ivf-pq")
    index, asked = Index(tmp_path / "index"), np.arange(100)
    knob = Knob("nprobe", 1, 1)
    inside = Queries.prepare(index.rows.unit(asked), index.rows, np.arange(700), asked >= 0)
    assert inside.recall(index.searcher, knob) == pytest.approx(
        (10 * replace(inside, inside_Q=asked < 0).recall(index.searcher, knob) - 1) / 9, abs=0.01
    )


def test_a_grown_folder(model: Path, tmp_path: Path) -> None:
    """Only what is new of it is added; what has changed is refused until it is taken out."""
    folder, path = tmp_path / "pictures", tmp_path / "index"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.png").write_bytes(picture(n))
    build_index(model, folder, path, workers=0)
    (folder / "0a.png").write_bytes(picture(9))
    assert append(None, folder, path, workers=0)["images"] == 6
    assert append(None, folder, path, workers=0)["status"] == "nothing left to do"
    opened = Index(path)
    keys = [opened.row(row)["key"] for row in range(6)]
    assert keys == [*(f"{n}.png" for n in range(5)), "0a.png"]
    assert opened.image(5) == picture(9)
    remove(path, ["1.png"])
    assert append(None, folder, path, workers=0)["status"] == "nothing left to do"
    for changed in (picture(7), picture(7) + b"longer"):
        (folder / "3.png").write_bytes(changed)
        with pytest.raises(RetrievalError, match=r"3.png has changed since .*--remove"):
            append(None, folder, path, workers=0)
    remove(path, ["3.png"])
    assert append(None, folder, path, workers=0)["images"] == 6
    assert Index(path).row(5)["key"] == "3.png"


@pytest.mark.parametrize("same_size", [True, False])
def test_a_repaired_shard(model: Path, tmp_path: Path, same_size: bool) -> None:
    shards, path = make_shards(tmp_path / "shards", (5, 3)), tmp_path / "index"
    build_index(model, shards, path, workers=0)
    write_tar(
        shards / "00001.tar", [training_sample(7, row) for row in range(3 if same_size else 9)]
    )
    with pytest.raises(RetrievalError, match=r"00001.tar has changed since .*--remove"):
        append(None, shards, path, workers=0)
    remove(path, [training_sample(1, row)[0] for row in range(3)])
    assert append(None, shards, path, workers=0)["images"] == (8 if same_size else 14)
    assert Index(path).image(5) == training_sample(7, 0)[1]["png"]
    assert append(None, shards, path, workers=0)["status"] == "nothing left to do"


def test_a_grown_file_of_captions(model: Path, tmp_path: Path) -> None:
    lines, path = tmp_path / "captions.txt", tmp_path / "index"
    lines.write_text("a cat\na dog\n")
    embed_source(model, lines, tmp_path / "texts")
    build_index(None, tmp_path / "texts", path)
    lines.write_text("a cat\na dog\na tree\n")
    with pytest.raises(RetrievalError, match=r"captions.txt/part 0 has changed since"):
        append(None, lines, path)


def test_failures_are_counted_once(model: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    samples = [training_sample(0, row) for row in range(30)]
    write_tar(shards / "00000.tar", [*samples, ("bad", {"jpg": b"no"})])
    build_index(model, shards, tmp_path / "index", workers=0)
    write_tar(shards / "00001.tar", [training_sample(1, 0)])
    embed_source(model, shards, tmp_path / "embeddings", workers=0)
    result = append(None, tmp_path / "embeddings", tmp_path / "index")
    assert (result["images"], result["failed"]) == (31, 1)


def test_only_rows_that_were_held_out_are_left(index: Path) -> None:
    opened = Index(index)
    held = np.load(index / "g1" / "held_out.npz")["rows_H"].tolist()
    remove(index, [opened.row(row)["key"] for row in range(40) if row not in held])
    left = Index(index)
    found = left.search(left.rows.unit(np.arange(len(held))), 1)
    assert [matches[0].row for matches in found] == list(range(len(held)))


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
    whole = shutil.copytree(built, tmp_path / "whole")
    append(None, more, whole, workers=0, batch_size=1)
    for _ in killed_twenty_times(lambda: append(None, more, index, workers=0, batch_size=1)):
        assert len(Index(index)) in (40, 60)
        if len(Index(index)) == 60:
            assert_same(index, whole)
            shutil.rmtree(index)
            shutil.copytree(built, index)
    append(None, more, index, workers=0, batch_size=1)
    assert_same(index, whole)
    out, undisturbed = tmp_path / "embeddings", tmp_path / "undisturbed"
    embed_source(model, shards, undisturbed, workers=0, batch_size=1)

    def assert_undisturbed() -> None:
        for file in undisturbed.rglob("*.npy"):
            same = out / file.relative_to(undisturbed)
            np.testing.assert_array_equal(np.load(same), np.load(file))

    for met in killed_twenty_times(
        lambda: embed_source(model, shards, out, workers=0, batch_size=1)
    ):
        if not met:
            assert_undisturbed()
            shutil.rmtree(out)
    embed_source(model, shards, out, workers=0, batch_size=1)
    assert_undisturbed()


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
    assert len(Index(index)) == 60
    for row in range(12):
        remove(index, [training_sample(5, row)[0]])
    done.set()
    reader.join()
    assert faults == []
    assert seen <= {40, *range(48, 61)}
    assert len(opened) == 40


def test_a_change_while_an_index_is_opened(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memmap, keys = np.memmap, iter([training_sample(0, 0)[0]])

    def late(*arguments: Any, **options: Any) -> Any:
        if key := next(keys, None):
            remove(index, [key])
        return memmap(*arguments, **options)

    monkeypatch.setattr(np, "memmap", late)
    assert len(Index(index)) == 39


def test_shards_of_the_first_build_are_known(index: Path, model: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", (3,))
    append(model, other, index, workers=0)
    assert len(Index(index)) == 43
    key = training_sample(0, 1)[0]  # of both
    with pytest.raises(RetrievalError, match=rf"{key} is in several sources; give .*/{key} or /"):
        remove(index, [key])
    assert remove(index, [f"{other}/{key}"])["images"] == 42
    assert Index(index).image(1) == training_sample(0, 1)[1]["png"]
