"""Stored embeddings: float16 rows in a memory-mapped file, used as float32 unit rows.

The file is an index of FAISS's own format (a flat scalar quantizer of float16): FAISS scores its
rows where they lie, and anything that reads FAISS can search it exactly.
"""

# N rows, Q queries, D embedding width, K hits

# faiss adds keyword constructors at run time, which its stubs do not have:
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
from numpy.typing import NDArray

# isort: split
import faiss  # after torch: both load OpenMP
from faiss.contrib.exhaustive_search import knn_ground_truth

from clip_retrieval.errors import RetrievalError

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

BLOCK_ROWS = 1 << 14  # rows on their way to somewhere at a time
UNIT_TOLERANCE = 1e-2  # float16 rounding leaves a unit row within 1e-3 of length one
_SCORED = 16  # queries whose hits are scored at a time, small enough for the cache


class Rows:
    """The rows of a file, memory-mapped.

    Attributes:
        stored_ND: float16.
        flat: the same rows as FAISS's index of inner products.

    Raises:
        RetrievalError: the file is missing, truncated or holds something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.flat: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise RetrievalError(
                f"{path} is truncated or is no FAISS index; build the index again"
            ) from error
        if not isinstance(self.flat, faiss.IndexScalarQuantizer):
            raise RetrievalError(f"{path} holds no float16 rows; build the index again")
        count, dim = self.flat.ntotal, self.flat.d
        start = path.stat().st_size - 2 * count * dim
        self.stored_ND: Float16 = np.memmap(path, np.float16, "r", start, (count, dim))

    def __len__(self) -> int:
        return len(self.stored_ND)

    def unit(self, rows_N: Int64) -> Float32:
        """The rows named, as unit rows."""
        return unit_rows(self.stored_ND[rows_N])


class RowWriter:
    """Writes the file that Rows reads; as a context manager it sees that all rows came."""

    def __init__(self, path: Path, count: int, dim: int) -> None:
        flat = faiss.IndexScalarQuantizer(
            dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        flat.ntotal = count
        header = faiss.serialize_index(flat).tobytes()[:-8]  # ends in the size of no codes
        self._file = path.open("wb")
        self._file.write(header + struct.pack("<q", 2 * count * dim))

    def write(self, rows_ND: Float16) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(rows_ND).data)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def unit_rows(stored: Float16 | Float32) -> Float32:
    """float32 rows of length one, over the last axis.

    float16 rounds each number by up to one part in 2,048; renormalised, a row's product with
    itself is 1 again.
    """
    rows = np.asarray(stored, dtype=np.float32)
    norms = np.sqrt(np.einsum("...d,...d->...", rows, rows))[..., None]
    return rows / np.maximum(norms, np.float32(1e-12))


def check_unit(rows_ND: NDArray[Any], where: str, first: int = 0) -> None:
    """Raises RetrievalError naming the first row that is not finite or not of length one.

    Args:
        first: the number of rows_ND[0], for the message.
    """
    rows = rows_ND.astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))  # NaN is bad as well
    if len(bad):
        raise RetrievalError(
            f"{where}: row {first + bad[0]} has the length {norms[bad[0]]:.3f}, expected 1 "
            f"({len(bad)} such rows); cosine similarity needs normalised embeddings without NaN, "
            "make them again"
        )


def blocks(rows: Rows, rows_N: Int64, size: int = BLOCK_ROWS) -> Iterator[tuple[Int64, Float32]]:
    """The rows named, `size` at a time, as (row numbers, unit rows)."""
    for start in range(0, len(rows_N), size):
        chosen = rows_N[start : start + size]
        yield chosen, rows.unit(chosen)


def rescore(rows: Rows, queries_QD: Float32, candidates_QC: Int64) -> tuple[Int64, Float32]:
    """Each query's candidates in the order of their exact cosine similarity, and these.

    Candidates below zero (FAISS's "nothing found") come out last, as row -1 and -inf. Equal
    similarities are ordered by row.
    """
    scores_QC = np.empty(candidates_QC.shape, np.float32)
    for start in range(0, len(queries_QD), _SCORED):
        some = slice(start, start + _SCORED)
        found_QCD = rows.unit(np.maximum(candidates_QC[some], 0))
        scores_QC[some] = np.einsum("qd,qcd->qc", queries_QD[some], found_QCD)
    scores_QC[candidates_QC < 0] = -np.inf
    order_QC = np.lexsort((candidates_QC, -scores_QC), axis=-1)
    return (
        np.take_along_axis(candidates_QC, order_QC, 1),
        np.take_along_axis(scores_QC, order_QC, 1),
    )


def exact_search(rows: Rows, queries_QD: Float32, k: int, rows_N: Int64) -> tuple[Int64, Float32]:
    """The k nearest of the rows named, by comparing with every one; on the GPUs, if there are."""
    unit = (unit_BD for _, unit_BD in blocks(rows, rows_N))
    found_QK = knn_ground_truth(queries_QD, unit, k, faiss.METRIC_INNER_PRODUCT)[1]
    return rescore(rows, queries_QD, rows_N[found_QK])
