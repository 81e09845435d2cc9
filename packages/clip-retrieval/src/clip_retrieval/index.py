"""The FAISS index of the codes: trained, filled and searched as planned.

What the codes find is scored again from the float16 rows, inside FAISS for the candidates and
exactly for the hits, so a picture finds itself at 1.0 whatever the codes are.
"""

# N rows, Q queries, D embedding width, K hits

# faiss adds keyword constructors at run time, which its stubs do not have:
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import ctypes
import logging
import math
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

# isort: split
import faiss  # after torch: both load OpenMP
from faiss.contrib.ondisk import merge_ondisk

from clip_retrieval.errors import RetrievalError
from clip_retrieval.plan import DISK_ROWS, Plan
from clip_retrieval.vectors import Float32, Int64, Rows, blocks, rescore

log = logging.getLogger(__name__)

TUNED_FOR = 10  # hits; more hits search wider in proportion
LISTS = "lists.ivfdata"
_PARTS, _TRAINED = "parts", "trained"  # of an on-disk index, while it is made
_ON_GPU = ("flat", "ivf-sq8")  # families that FAISS searches there as they are
_SPARE = 8  # hits beyond those asked for: FAISS takes float16 rows as they are, not as unit rows
_QUERIES = 1024  # searched at a time
_GPU_MOST = 2048  # hits, and lists looked into, that FAISS can do on a GPU


def faiss_has_gpu() -> bool:
    """Whether this faiss can build on a GPU here (faiss-cpu has get_num_gpus as well)."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def to_gpu(index: Any, family: str) -> Any:
    """The index on the GPU, its numbers as float16, by cuVS where this faiss has it.

    What FAISS cannot search there stays on the CPU, with a message.
    """
    if family not in _ON_GPU or not faiss_has_gpu():
        log.info("the CPU searches this index (%s): %s", family, _why_not(family))
        return index
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    options.use_cuvs = "CUVS" in faiss.get_compile_options()
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)
    except RuntimeError as error:
        _take_back(error)
        return index


def _take_back(error: RuntimeError) -> None:
    # most likely out of GPU memory
    log.warning("the GPU cannot take it, the CPU will: %s", str(error).splitlines()[0])


def on_gpu(index: Any) -> bool:
    """Whether the GPU searches it."""
    if isinstance(index, faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return "Gpu" in type(index).__name__


def _why_not(family: str) -> str:
    if not faiss_has_gpu():
        return "this faiss sees no GPU"
    return f"on a GPU FAISS has {' and '.join(_ON_GPU)} only"


def fill(plan: Plan, rows: Rows, rows_N: Int64, directory: Path, *, gpu: bool = False) -> Any:
    """A new index of the rows named, trained on a random sample of them, always one of the CPU.

    Args:
        directory: where the on-disk family keeps its lists.
        gpu: train and add there.
    """
    index = faiss.index_factory(len(rows.stored_ND[0]), plan.factory, faiss.METRIC_INNER_PRODUCT)
    if plan.lists:
        index.cp.min_points_per_centroid = 1  # FAISS would warn below 39
    if gpu and on_gpu(moved := to_gpu(index, plan.family)):
        try:
            _train(moved, plan, rows, rows_N)
            add(moved, rows, rows_N)
            return faiss.index_gpu_to_cpu(moved)
        except RuntimeError as error:
            _take_back(error)
    _train(index, plan, rows, rows_N)
    if plan.family == "on-disk":
        return _fill_on_disk(index, rows, rows_N, directory)
    add(index, rows, rows_N)
    return index


def _train(index: Any, plan: Plan, rows: Rows, rows_N: Int64) -> None:
    if not index.is_trained:
        wanted = min(len(rows_N), plan.train_rows)
        sample = np.random.default_rng(0).choice(rows_N, wanted, replace=False)
        index.train(rows.unit(np.sort(sample)))


def _fill_on_disk(trained: Any, rows: Rows, rows_N: Int64, directory: Path) -> Any:
    """Lists made in memory a part at a time and merged on the disk."""
    parts = directory / _PARTS
    parts.mkdir()
    faiss.write_index(trained, str(parts / _TRAINED))
    for start in range(0, len(rows_N), DISK_ROWS):
        add(trained, rows, rows_N[start : start + DISK_ROWS])
        faiss.write_index(trained, str(parts / str(start)))
        trained.reset()
    return _merge_parts(directory)


def _merge_parts(directory: Path) -> Any:
    index = faiss.read_index(str(directory / _PARTS / _TRAINED))
    names = sorted(str(path) for path in (directory / _PARTS).iterdir() if path.name != _TRAINED)
    (directory / LISTS).unlink(missing_ok=True)
    with _stdout_to_stderr():
        merge_ondisk(index, names, str(directory / LISTS))
    return index


def finish(index: Any, plan: Plan, rows: Rows, held_H: Int64, directory: Path) -> Any:
    """The index with the rows that were held out."""
    if plan.family != "on-disk":
        add(index, rows, held_H)
        return index
    # FAISS 1.15 garbles lists on the disk that are added to: they are merged once more
    last = faiss.read_index(str(directory / _PARTS / _TRAINED))
    add(last, rows, held_H)
    faiss.write_index(last, str(directory / _PARTS / "held"))
    merged = _merge_parts(directory)
    shutil.rmtree(directory / _PARTS)
    return merged


@contextmanager
def _stdout_to_stderr() -> Generator[None]:
    """FAISS says what it does to its lists on stdout, where our JSON goes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # FAISS's own buffer
        os.dup2(kept, 1)
        os.close(kept)


def add(index: Any, rows: Rows, rows_N: Int64) -> None:
    """Add the rows named, under their row numbers."""
    for numbers, unit_BD in blocks(rows, rows_N):
        index.add_with_ids(unit_BD, numbers)


def write_index(index: Any, path: Path) -> None:
    """Write the index to a file of FAISS's own format."""
    faiss.write_index(index, str(path))


def read_index(path: Path) -> Any:
    """Raises RetrievalError where FAISS cannot read the file."""
    try:
        with _stdout_to_stderr() if (path.parent / LISTS).exists() else nullcontext():
            return faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR)
    except RuntimeError as error:
        raise RetrievalError(
            f"{path} is truncated or is no FAISS index; build the index again"
        ) from error


@dataclass(frozen=True)
class Knob:
    """How wide to search; handed over with every search, so that an index is never changed.

    Attributes:
        parameter: "efSearch", "nprobe", or None where the search is exact.
        value: tuned for ten hits; more hits search wider in proportion.
        candidates: taken by their codes, per hit asked for; scored from the float16 rows.
    """

    parameter: str | None
    value: int
    candidates: int = 1

    def faiss_parameters(self, k: int, asked: int, most: int = sys.maxsize) -> Any:
        """FAISS's own object for a search of k hits, of which more are asked for.

        Args:
            most: lists and candidates.
        """
        width = self.value * math.ceil(max(k, TUNED_FOR) / TUNED_FOR)
        if self.parameter is None:
            return None
        if self.parameter == "efSearch":
            width = max(width, max(k, TUNED_FOR) * self.candidates)
            inner = faiss.SearchParametersHNSW(efSearch=width)
        else:
            inner = faiss.SearchParametersIVF(nprobe=min(width, most))
        factor = min(self.candidates * max(k, TUNED_FOR), most) / asked
        return faiss.IndexRefineSearchParameters(k_factor=max(factor, 1), base_index_params=inner)


class Searcher:
    """An index over rows; it is never changed, so threads may share it."""

    def __init__(self, index: Any, rows: Rows) -> None:
        self.index, self.rows, self._on_gpu = index, rows, on_gpu(index)
        # FAISS wants as many rows as codes, which is not so while some are held out
        empty = faiss.IndexFlatIP(index.d)
        self._refined = faiss.IndexRefine(empty, empty)
        self._refined.base_index, self._refined.refine_index = index, rows.flat
        self._refined.ntotal = len(rows)  # the bound of a row number

    def search(self, queries_QD: Float32, k: int, knob: Knob) -> tuple[Int64, Float32]:
        """The k best rows and their exact cosine similarities, [Q, K] each, best first.

        K is k, or the count of the index if that is less. Rows not found are -1 and come last.
        """
        k = min(k, self.index.ntotal)
        asked = min(k + _SPARE, self.index.ntotal)
        most = _GPU_MOST if self._on_gpu else sys.maxsize
        if asked > most:  # all rows compared, by the CPU
            return self._in_blocks(self.rows.flat, queries_QD, k, asked, None)
        searched = self._refined if knob.parameter else self.index
        parameters = knob.faiss_parameters(k, asked, most)
        return self._in_blocks(searched, queries_QD, k, asked, parameters)

    def search_among(self, queries_QD: Float32, k: int, rows_N: Int64) -> tuple[Int64, Float32]:
        """The same of the rows named only, all of which are compared."""
        chosen = np.zeros(len(self.rows), bool)
        chosen[rows_N] = True
        bits = np.packbits(chosen, bitorder="little")
        only = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        k = min(k, len(rows_N))
        return self._in_blocks(self.rows.flat, queries_QD, k, min(k + _SPARE, len(rows_N)), only)

    def _in_blocks(
        self, searched: Any, queries_QD: Float32, k: int, asked: int, parameters: Any
    ) -> tuple[Int64, Float32]:
        found = list[tuple[Int64, Float32]]()
        for start in range(0, len(queries_QD), _QUERIES):
            some_QD = np.ascontiguousarray(queries_QD[start : start + _QUERIES])
            rows_QA = searched.search(some_QD, asked, params=parameters)[1]
            rows_QA, scores_QA = rescore(self.rows, some_QD, rows_QA)
            found.append((rows_QA[:, :k], scores_QA[:, :k]))
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])
