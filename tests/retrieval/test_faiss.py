"""Every family against exact search: results, the tuned recall, rows under their own numbers."""

# N rows, Q queries, D width

from pathlib import Path

import numpy as np
import pytest
from clip_retrieval import index as faiss_index
from clip_retrieval.index import Knob
from clip_retrieval.plan import Plan, list_count, plan_index
from clip_retrieval.vectors import exact_search, unit_rows

import faiss  # isort: skip

COUNT, DIM = 20_000, 64


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit rows around 200 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(200, DIM))
    rows = centres[rng.integers(200, size=count)] + 0.7 * rng.normal(size=(count, DIM))
    return unit_rows(rows.astype(np.float32))


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    return clustered(COUNT, seed=1).astype(np.float16)


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    """Queries shifted off the cloud, as captions are."""
    shift = np.random.default_rng(9).normal(size=DIM).astype(np.float32)
    return unit_rows(clustered(300, seed=2) + 0.1 * shift)


def plan_of(family: str) -> Plan:
    lists = list_count(COUNT)
    factory, parameter, largest = {
        "flat": ("IDMap2,Flat", None, 1),
        "hnsw": ("IDMap2,HNSW32_SQ8", "efSearch", 4096),
        "ivf-sq8": (f"IVF{lists},SQ8", "nprobe", lists),
    }[family]
    oversample = 1 if family == "flat" else 2
    return Plan(family, factory, "test", 0, 0, 0, parameter, largest, oversample)


def test_flat_equals_faiss_flat(stored: np.ndarray, texts: np.ndarray) -> None:
    index = faiss_index.fill(plan_of("flat"), stored, np.arange(COUNT))
    rows_QK, scores_QK = faiss_index.search(index, stored, texts, 10, Knob(None, 1, 1))
    flat = faiss.IndexFlatIP(DIM)
    flat.add(unit_rows(stored))
    expected_scores, expected_rows = flat.search(texts, 10)
    np.testing.assert_array_equal(rows_QK, expected_rows)
    np.testing.assert_allclose(scores_QK, expected_scores, atol=1e-6)


def test_exact_search_equals_float64(stored: np.ndarray, texts: np.ndarray) -> None:
    some = np.arange(0, COUNT, 3)
    rows_QK, scores_QK = exact_search(stored, texts, 10, some, block=1000)
    vectors = stored.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = texts.astype(np.float64) @ vectors[some].T
    np.testing.assert_array_equal(rows_QK, some[np.argsort(-scores, axis=1)[:, :10]])
    np.testing.assert_allclose(scores_QK, -np.sort(-scores, axis=1)[:, :10], atol=1e-6)


@pytest.mark.parametrize("family", ["hnsw", "ivf-sq8"])
def test_tuned_to_the_target(
    family: str, stored: np.ndarray, texts: np.ndarray, tmp_path: Path
) -> None:
    plan = plan_of(family)
    order = np.random.default_rng(0).permutation(COUNT)
    kept_out, kept = order[:300], order[300:]
    index = faiss_index.fill(plan, stored, kept)
    queries = {"image": unit_rows(stored[kept_out]), "text": texts}
    held_out = {k: faiss_index.Queries.prepare(q, stored, kept) for k, q in queries.items()}
    knob, recall = faiss_index.tune(index, plan, stored, held_out, 0.95)
    assert 1 <= knob.value < plan.largest
    assert min(recall.values()) >= 0.93  # 150 queries: within their own error of 0.95

    # with the rows kept out added, read from disk: fresh queries against FAISS flat
    faiss_index.add(index, stored, kept_out)
    faiss_index.write_index(index, tmp_path / "image.index")
    again = faiss_index.read_index(tmp_path / "image.index")
    assert again.ntotal == COUNT
    fresh = clustered(500, seed=5)
    rows_QK, scores_QK = faiss_index.search(again, stored, fresh, 10, knob)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(unit_rows(stored))
    expected = flat.search(fresh, 10)[1]
    found = np.mean([len(set(a) & set(b)) for a, b in zip(rows_QK, expected, strict=True)]) / 10
    assert found >= 0.94
    # the similarities are the exact ones, of the rows they stand beside
    exact = np.einsum("qd,qkd->qk", fresh, unit_rows(stored[rows_QK]))
    np.testing.assert_allclose(scores_QK, exact, atol=1e-6)
    # a picture that is in the index finds itself
    own_rows, own_scores = faiss_index.search(again, stored, unit_rows(stored[kept_out]), 1, knob)
    # however many hits are asked for, they are found
    assert faiss_index.search(again, stored, fresh[:1], 3000, knob)[0].min() >= 0
    assert np.mean(own_rows[:, 0] == kept_out) > 0.98
    assert np.abs(own_scores[own_rows[:, 0] == kept_out] - 1).max() < 1e-3


def test_plan_factories_are_faiss_own() -> None:
    """FAISS understands the strings the plan writes for larger sets."""
    for gpu, expected in ((False, "IndexHNSWSQ"), (True, "IndexIVFScalarQuantizer")):
        plan = plan_index(40_000, 512, max_memory=1 << 30, gpu=gpu)
        index = faiss.index_factory(512, plan.factory, faiss.METRIC_INNER_PRODUCT)
        inner = faiss.downcast_index(index.index) if plan.family == "hnsw" else index
        assert type(inner).__name__ == expected


@pytest.mark.parametrize("family", ["flat", "hnsw", "ivf-sq8"])
def test_index_bytes_are_as_planned(family: str, tmp_path: Path) -> None:
    """Within 5% of the file, at a width where a vector outweighs what surrounds it."""
    stored = np.random.default_rng(0).normal(size=(4000, 256)).astype(np.float16)
    count = {"flat": 1 << 10, "hnsw": 4000, "ivf-sq8": 4000}[family]
    per_vector = {"flat": 4 * 256 + 8, "hnsw": 256 + 256 + 8 + 12, "ivf-sq8": 256 + 8}[family]
    plan = plan_of(family)
    factory = "IVF16,SQ8" if family == "ivf-sq8" else plan.factory
    plan = Plan(family, factory, "test", 0, 0, 0)
    index = faiss_index.fill(plan, stored, np.arange(count))
    faiss_index.write_index(index, tmp_path / "image.index")
    assert (tmp_path / "image.index").stat().st_size == pytest.approx(count * per_vector, rel=0.05)


def test_smallest() -> None:
    for largest in (1, 7, 64, 1000):
        for needed in (1, 2, 5, 33, 700):
            value = faiss_index.smallest(lambda v, n=needed: v >= n, largest)
            assert value == largest if needed >= largest else needed <= value <= needed * 1.07 + 1
