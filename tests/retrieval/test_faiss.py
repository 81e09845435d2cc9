"""Every family against exact search: results, the tuned recall, rows under their own numbers."""

# N rows, Q queries, D width

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clip_retrieval import RetrievalError
from clip_retrieval import index as faiss_index
from clip_retrieval.index import Knob, Searcher
from clip_retrieval.plan import plan_index
from clip_retrieval.tune import Queries, smallest, tune
from clip_retrieval.vectors import Rows, RowWriter, check_unit, exact_search, unit_rows

import faiss  # isort: skip

COUNT, DIM = 20_000, 64


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit rows around 200 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(200, DIM))
    rows = centres[rng.integers(200, size=count)] + 0.7 * rng.normal(size=(count, DIM))
    return unit_rows(rows.astype(np.float32))


def write(path: Path, rows: np.ndarray) -> Rows:
    writer = RowWriter(path, *rows.shape)
    for block in np.array_split(rows.astype(np.float16), 3):
        writer.write(block)
    writer.close()
    return Rows(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return write(tmp_path_factory.mktemp("rows") / "rows.index", clustered(COUNT, seed=1))


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    """Queries shifted off the cloud, as captions are."""
    shift = np.random.default_rng(9).normal(size=DIM).astype(np.float32)
    return unit_rows(clustered(300, seed=2) + 0.1 * shift)


def flat_of(rows: Rows) -> faiss.IndexFlatIP:
    flat = faiss.IndexFlatIP(DIM)
    flat.add(unit_rows(rows.stored_ND))
    return flat


def test_the_file_of_rows_is_an_index_of_faiss(tmp_path: Path) -> None:
    stored = clustered(1000, seed=3).astype(np.float16)
    rows = write(tmp_path / "rows.index", stored)
    np.testing.assert_array_equal(rows.stored_ND, stored)
    plain = faiss.read_index(str(tmp_path / "rows.index"))  # without memory-mapping
    np.testing.assert_array_equal(plain.reconstruct_n(0, 1000), stored.astype(np.float32))
    assert plain.search(unit_rows(stored[:20]), 1)[1].ravel().tolist() == list(range(20))


def test_flat_equals_faiss_flat(rows: Rows, texts: np.ndarray, tmp_path: Path) -> None:
    plan = plan_index(COUNT, DIM, max_memory=1 << 30)
    index = faiss_index.fill(plan, rows, np.arange(COUNT), tmp_path)
    rows_QK, scores_QK = Searcher(index, rows).search(texts, 10, Knob(None, 1))
    expected_scores, expected_rows = flat_of(rows).search(texts, 10)
    np.testing.assert_array_equal(rows_QK, expected_rows)
    np.testing.assert_allclose(scores_QK, expected_scores, atol=1e-6)


def test_search_among_rows_equals_float64(rows: Rows, texts: np.ndarray) -> None:
    some = np.arange(0, COUNT, 3)
    vectors = unit_rows(rows.stored_ND).astype(np.float64)
    scores = texts.astype(np.float64) @ vectors[some].T
    searcher = Searcher(faiss.IndexFlatIP(DIM), rows)
    for found in (exact_search(rows, texts, 10, some), searcher.search_among(texts, 10, some)):
        np.testing.assert_array_equal(found[0], some[np.argsort(-scores, axis=1)[:, :10]])
        np.testing.assert_allclose(found[1], -np.sort(-scores, axis=1)[:, :10], atol=1e-6)


@pytest.mark.parametrize("family", ["hnsw", "ivf-sq8", "ivf-pq", "rabitq", "on-disk"])
def test_tuned_to_the_target(family: str, rows: Rows, texts: np.ndarray, tmp_path: Path) -> None:
    plan = plan_index(COUNT, DIM, max_memory=1 << 30, family=family)
    order = np.random.default_rng(0).permutation(COUNT)
    kept_out, kept = np.sort(order[:300]), np.sort(order[300:])
    index = faiss_index.fill(plan, rows, kept, tmp_path)
    queries = {"image": rows.unit(kept_out), "text": texts}
    held_out = {k: Queries.prepare(q, rows, kept) for k, q in queries.items()}
    knob, recall = tune(Searcher(index, rows), plan, held_out, 0.95)
    assert 1 <= knob.value < plan.largest
    assert min(recall.values()) >= 0.93  # 150 queries: within their own error of 0.95

    # with the rows kept out added, read from disk: fresh queries against FAISS flat
    index = faiss_index.finish(index, plan, rows, kept_out, tmp_path)
    faiss_index.write_index(index, tmp_path / "image.index")
    again = Searcher(faiss_index.read_index(tmp_path / "image.index"), rows)
    assert again.index.ntotal == COUNT
    fresh = clustered(500, seed=5)
    rows_QK, scores_QK = again.search(fresh, 10, knob)
    expected = flat_of(rows).search(fresh, 10)[1]
    found = np.mean([len(set(a) & set(b)) for a, b in zip(rows_QK, expected, strict=True)]) / 10
    assert found >= 0.93
    # the similarities are the exact ones, of the rows they stand beside
    exact = np.einsum("qd,qkd->qk", fresh, unit_rows(rows.stored_ND[rows_QK]))
    np.testing.assert_allclose(scores_QK, exact, atol=1e-6)
    # a picture that is in the index finds itself, at one
    own_rows, own_scores = again.search(rows.unit(kept_out), 1, knob)
    assert np.mean(own_rows[:, 0] == kept_out) > 0.97
    assert np.abs(own_scores[own_rows[:, 0] == kept_out] - 1).max() < 1e-6
    # however many hits are asked for, they are found
    assert again.search(fresh[:1], 3000, knob)[0].min() >= 0


@pytest.mark.parametrize("family", ["flat", "hnsw", "ivf-sq8", "ivf-pq", "rabitq"])
def test_index_bytes_are_as_planned(family: str, tmp_path: Path) -> None:
    """Within 10% of the file, at a width where a vector outweighs what surrounds it."""
    stored = unit_rows(np.random.default_rng(0).normal(size=(8000, 256)).astype(np.float32))
    rows = write(tmp_path / "rows.index", stored)
    plan = plan_index(8000, 256, max_memory=1 << 30, family=family)
    index = faiss_index.fill(plan, rows, np.arange(8000), tmp_path)
    faiss_index.write_index(index, tmp_path / "image.index")
    assert (tmp_path / "image.index").stat().st_size == pytest.approx(plan.index_bytes, rel=0.1)


def test_rows_that_are_not_of_length_one() -> None:
    good = clustered(10, seed=0).astype(np.float16)
    check_unit(good, "x.npy")
    for value in (2.0, np.nan, np.inf, 0.0):
        bad = good.copy()
        bad[7] *= np.float16(value)
        with pytest.raises(RetrievalError, match=r"x.npy: row 7 has the length .*expected 1"):
            check_unit(bad, "x.npy")


@pytest.mark.parametrize("family", ["flat", "ivf-sq8", "rabitq"])
def test_without_a_gpu_the_cpu_searches(family: str, caplog: pytest.LogCaptureFixture) -> None:
    if faiss_index.faiss_has_gpu():
        pytest.skip("there is a GPU")
    index = faiss.IndexFlatIP(DIM)
    with caplog.at_level("INFO"):
        assert faiss_index.to_gpu(index, family) is index
    assert "this faiss sees no GPU" in caplog.text


def test_what_a_gpu_cannot_take_stays_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index, moved = faiss.IndexFlatIP(DIM), []

    def refuse(*arguments: object) -> None:
        moved.append(arguments)
        raise RuntimeError("out of memory\nat …")

    monkeypatch.setattr(faiss_index, "faiss_has_gpu", lambda: True)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
    assert faiss_index.to_gpu(index, "rabitq") is index
    assert not moved
    assert faiss_index.to_gpu(index, "flat") is index
    assert moved[0][3].useFloat16
    assert "the GPU cannot take it, the CPU will: out of memory" in caplog.text


def test_a_build_that_a_gpu_cannot_hold_is_the_cpus(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class GpuIndex:
        is_trained = False

        def train(self, _: np.ndarray) -> None:
            raise RuntimeError("out of memory\nat …")

    monkeypatch.setattr(faiss_index, "to_gpu", lambda *_: GpuIndex())
    plan = plan_index(COUNT, DIM, max_memory=1 << 30, family="ivf-sq8")
    index = faiss_index.fill(plan, rows, np.arange(1000), tmp_path, gpu=True)
    assert (type(index), index.ntotal) == (faiss.IndexIVFScalarQuantizer, 1000)
    assert "the GPU cannot take it, the CPU will: out of memory" in caplog.text


def test_what_is_asked_of_a_gpu_is_bounded(
    rows: Rows, texts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GpuIndexFlat(faiss.IndexFlatIP):
        pass

    index = GpuIndexFlat(DIM)  # of zeros, so that its own hits would be others
    index.add(np.zeros((COUNT, DIM), np.float32))
    knob, lists = Knob("nprobe", 4096, 128), list[int]()
    original = faiss.SearchParametersIVF
    monkeypatch.setattr(
        faiss, "SearchParametersIVF", lambda nprobe: lists.append(nprobe) or original(nprobe=nprobe)
    )
    assert int(knob.faiss_parameters(100, 108, 2048).k_factor * 108) == 2048
    assert lists == [2048]
    found = Searcher(index, rows).search(texts[:3], 2041, knob)[0]
    np.testing.assert_array_equal(found, exact_search(rows, texts[:3], 2041, np.arange(COUNT))[0])


def test_smallest() -> None:
    for largest in (1, 7, 64, 1000):
        for needed in (1, 2, 5, 33, 700):
            value = smallest(lambda v, n=needed: v >= n, largest)
            assert value == largest if needed >= largest else needed <= value <= needed * 1.07 + 1
