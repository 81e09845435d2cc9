"""The FAISS index: filled as planned, its search tuned to a recall that is measured.

Recall is measured on queries the index does not hold: pictures kept out until the end, and their
captions, which lie well away from the cloud of pictures and are the harder case.
"""

# N rows, Q queries, D embedding width

# faiss adds keyword constructors at run time, which its stubs do not have:
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

# isort: split
import faiss  # after torch: both load OpenMP

from clip_retrieval.errors import RetrievalError
from clip_retrieval.plan import BLOCK_ROWS, TRAIN_PER_LIST, Plan, list_count
from clip_retrieval.vectors import (
    Float16,
    Float32,
    Int64,
    blocks,
    exact_search,
    rescore,
    unit_rows,
)

log = logging.getLogger(__name__)

RECALL_AT = 10
_MARGIN = 0.005  # tuned this far above the target, on queries that are not the ones reported


def faiss_has_gpu() -> bool:
    """Whether this faiss can build on a GPU here (faiss-cpu has get_num_gpus as well)."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def fill(plan: Plan, stored_ND: Float16, rows_N: Int64, *, gpu: bool = False) -> Any:
    """A new FAISS index of the rows named, trained on a random sample of them.

    With `gpu`, inverted lists are trained and filled on the GPU; what is returned is always an
    index of the CPU.
    """
    if gpu and plan.family == "ivf-sq8":
        try:
            return _fill(plan, stored_ND, rows_N, on_gpu=True)
        except RuntimeError as error:  # most likely out of GPU memory
            log.warning("the GPU could not build it, the CPU will: %s", str(error).splitlines()[0])
    return _fill(plan, stored_ND, rows_N, on_gpu=False)


def _fill(plan: Plan, stored_ND: Float16, rows_N: Int64, *, on_gpu: bool) -> Any:
    dim = stored_ND.shape[1]
    index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if on_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    if not index.is_trained:
        wanted = min(len(rows_N), TRAIN_PER_LIST * list_count(len(rows_N)))
        sample = np.random.default_rng(0).choice(rows_N, wanted, replace=False)
        index.train(unit_rows(stored_ND[np.sort(sample)]))
    add(index, stored_ND, rows_N)
    return faiss.index_gpu_to_cpu(index) if on_gpu else index


def add(index: Any, stored_ND: Float16, rows_N: Int64) -> None:
    """Add the rows named, under their row numbers."""
    for rows, unit_BD in blocks(stored_ND, rows_N, BLOCK_ROWS):
        index.add_with_ids(unit_BD, rows)


@dataclass(frozen=True)
class Knob:
    """How wide to search; handed over with every search, so that an index is never changed.

    Attributes:
        parameter: "efSearch", "nprobe", or None where the search is exact.
        value: tuned for ten hits; more hits search wider in proportion.
        oversample: candidates taken from the index per hit asked for; they are scored exactly.
    """

    parameter: str | None
    value: int
    oversample: int

    def faiss_parameters(self, k: int) -> Any:
        """FAISS's own object for a search of k hits."""
        width = self.value * math.ceil(max(k, RECALL_AT) / RECALL_AT)
        if self.parameter == "efSearch":
            return faiss.SearchParametersHNSW(efSearch=width)
        if self.parameter == "nprobe":
            return faiss.SearchParametersIVF(nprobe=width)
        return None


def search(
    index: Any, stored_ND: Float16, queries_QD: Float32, k: int, knob: Knob
) -> tuple[Int64, Float32]:
    """The k best rows and their exact cosine similarities, [Q, K] each, best first.

    K is k, or the count of the index if that is less. Rows not found are -1 and come last.
    """
    parameters = knob.faiss_parameters(k)
    wanted = min(k * knob.oversample, index.ntotal)
    rows, scores = list[Int64](), list[Float32]()
    for start in range(0, len(queries_QD), 64):  # bounds the rows being scored at a time
        some_QD = queries_QD[start : start + 64]
        candidates_QC = index.search(some_QD, wanted, params=parameters)[1]
        some_rows, some_scores = rescore(stored_ND, some_QD, candidates_QC, k)
        rows.append(some_rows)
        scores.append(some_scores)
    return np.concatenate(rows), np.concatenate(scores)


def write_index(index: Any, path: Path) -> None:
    """Write the index to a file of FAISS's own format."""
    faiss.write_index(index, str(path))


def read_index(path: Path) -> Any:
    """Raises RetrievalError where FAISS cannot read the file."""
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise RetrievalError(
            f"{path} is truncated or is no FAISS index; build the index again"
        ) from error


@dataclass(frozen=True)
class Queries:
    """Held-out queries and the similarity of the tenth best row to each."""

    queries_QD: Float32
    tenth_Q: Float32

    @classmethod
    def prepare(cls, queries_QD: Float32, stored_ND: Float16, rows_N: Int64) -> "Queries":
        """Answer the queries exactly, from the rows named."""
        k = min(RECALL_AT, len(rows_N))
        return cls(queries_QD, exact_search(stored_ND, queries_QD, k, rows_N)[1][:, -1])

    def half(self, which: int) -> "Queries":
        """Every second query, from the first (0) or the second (1); all of them if there is one."""
        chosen = slice(which, None, 2) if len(self.queries_QD) > 1 else slice(None)
        return Queries(self.queries_QD[chosen], self.tenth_Q[chosen])

    def recall(self, index: Any, stored_ND: Float16, knob: Knob) -> float:
        """The share of each query's ten nearest found, averaged; of equal rows any will do."""
        k = min(RECALL_AT, index.ntotal)
        scores_QK = search(index, stored_ND, self.queries_QD, k, knob)[1]
        return float((scores_QK >= self.tenth_Q[:, None] - 1e-6).mean())


def tune(
    index: Any, plan: Plan, stored_ND: Float16, held_out: dict[str, Queries], target: float
) -> tuple[Knob, dict[str, float]]:
    """The narrowest search that reaches the target on every kind of query, and its recall by kind.

    One half of the queries chooses it, the other half gives the recall.
    """

    def recall(value: int, half: int) -> dict[str, float]:
        knob = Knob(plan.parameter, value, plan.oversample)
        return {kind: q.half(half).recall(index, stored_ND, knob) for kind, q in held_out.items()}

    def reached(value: int) -> bool:
        return min(recall(value, 0).values()) >= min(target + _MARGIN, 1.0)

    value = smallest(reached, plan.largest) if plan.parameter and held_out else plan.largest
    measured = {kind: round(share, 4) for kind, share in recall(value, 1).items()}
    return Knob(plan.parameter, value, plan.oversample), measured


def smallest(reached: Callable[[int], bool], largest: int) -> int:
    """The smallest of 1 … largest that is enough, found by doubling and halving; else largest."""
    high = 1
    while not reached(high):
        if high == largest:
            return largest
        high = min(2 * high, largest)
    low = high // 2  # not enough, or zero
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        if reached(middle):
            high = middle
        else:
            low = middle
    return high
