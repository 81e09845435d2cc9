"""Stored embeddings: float16 rows in a memory-mapped .npy, used as float32 unit rows."""

# N rows, Q queries, D embedding width, K hits

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_retrieval.errors import RetrievalError

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def open_vectors(path: Path) -> Float16:
    """Memory-map float16 [N, D].

    Raises:
        RetrievalError: the file is missing, truncated or holds something else.
    """
    try:
        stored_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RetrievalError(f"{path} cannot be read ({error}); build the index again") from error
    if stored_ND.ndim != 2 or stored_ND.dtype != np.float16:
        raise RetrievalError(
            f"{path} holds {stored_ND.dtype} {stored_ND.shape}; expected float16 [rows, width]"
        )
    return stored_ND


def unit_rows(stored: Float16 | Float32) -> Float32:
    """float32 rows of length one, over the last axis.

    float16 rounds each number by up to one part in 2,048; renormalised, a row's product with
    itself is 1 again.
    """
    rows = np.asarray(stored, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(norms, np.float32(1e-12))


def blocks(stored_ND: Float16, rows_N: Int64, size: int) -> Iterator[tuple[Int64, Float32]]:
    """The rows named, `size` at a time, as (row numbers, unit rows)."""
    for start in range(0, len(rows_N), size):
        chosen = rows_N[start : start + size]
        yield chosen, unit_rows(stored_ND[chosen])


def rescore(
    stored_ND: Float16, queries_QD: Float32, candidates_QC: Int64, k: int
) -> tuple[Int64, Float32]:
    """The best k of each query's candidates by exact cosine similarity.

    Candidates below zero (FAISS's "nothing found") come out last, as row -1 and -inf. Equal
    similarities are ordered by row. Returns rows [Q, K] and similarities [Q, K].
    """
    found_QCD = unit_rows(stored_ND[np.maximum(candidates_QC, 0)])
    scores_QC = np.einsum("qd,qcd->qc", queries_QD, found_QCD, dtype=np.float32)
    scores_QC[candidates_QC < 0] = -np.inf
    order_QK = np.lexsort((candidates_QC, -scores_QC), axis=-1)[:, :k]
    return (
        np.take_along_axis(candidates_QC, order_QK, 1),
        np.take_along_axis(scores_QC, order_QK, 1),
    )


def exact_search(
    stored_ND: Float16, queries_QD: Float32, k: int, rows_N: Int64, block: int = 1 << 12
) -> tuple[Int64, Float32]:
    """The k nearest of the rows named, by comparing with every one, a block at a time."""
    best_rows = np.full((len(queries_QD), k), -1, np.int64)
    best_scores = np.full((len(queries_QD), k), -np.inf, np.float32)
    for chosen, unit_BD in blocks(stored_ND, rows_N, block):
        scores = np.concatenate([best_scores, queries_QD @ unit_BD.T], axis=1)
        rows = np.concatenate([best_rows, np.tile(chosen, (len(queries_QD), 1))], axis=1)
        order = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best_rows = np.take_along_axis(rows, order, 1)
        best_scores = np.take_along_axis(scores, order, 1)
    order = np.lexsort((best_rows, -best_scores), axis=-1)
    return np.take_along_axis(best_rows, order, 1), np.take_along_axis(best_scores, order, 1)
