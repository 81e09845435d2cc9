"""Which index to build, and why: a pure function of count, width, memory and device."""

import math
import re
from dataclasses import dataclass

from clip_retrieval.errors import RetrievalError

FLAT_NUMBERS = 1 << 24  # 64 MB of float32: one exact query takes about 10 ms on one core
HNSW_LINKS = 32  # M of the graph; its bottom level keeps 2 M links of 4 bytes a vector
HNSW_COUNT = 5_000_000  # beyond this a graph takes hours to build, lists take minutes
TRAIN_PER_LIST = 64  # vectors per k-means centroid
BLOCK_ROWS = 1 << 14  # rows on their way into the index at a time, as float32

_ID = 8  # bytes of a row number


@dataclass(frozen=True)
class Plan:
    """A choice of index.

    Attributes:
        family: "flat", "hnsw" or "ivf-sq8".
        factory: FAISS's own description of it.
        why: a few words, for people.
        bytes_per_vector: in memory, row number included.
        index_bytes: the whole index, in memory and on disk.
        build_bytes: the peak while building, the index included.
        parameter: the search's knob to be tuned ("efSearch", "nprobe"); None when exact.
        largest: the largest value of that knob.
        oversample: candidates taken from the index per hit asked for; they are scored exactly.
    """

    family: str
    factory: str
    why: str
    bytes_per_vector: int
    index_bytes: int
    build_bytes: int
    parameter: str | None = None
    largest: int = 1
    oversample: int = 1


def plan_index(count: int, dim: int, *, max_memory: int, gpu: bool = False) -> Plan:
    """Choose the index of `count` vectors of `dim` numbers within `max_memory` bytes.

    Small sets are compared exactly. Larger ones get a graph (HNSW, the fastest to query) where
    memory and patience allow, else inverted lists (IVF), which a GPU can build. Both keep one
    byte per number (SQ8); what they find is scored exactly from the float16 rows.

    Raises:
        RetrievalError: not even the smallest index fits.
    """
    block = min(count, BLOCK_ROWS) * dim * 4
    lists = list_count(count)
    centroids = lists * dim * 4
    sample = min(count, TRAIN_PER_LIST * lists) * dim * 4

    per_vector = 4 * dim + _ID
    flat = Plan(
        family="flat",
        factory="IDMap2,Flat",
        why="few enough to compare with every one, exactly",
        bytes_per_vector=per_vector,
        index_bytes=count * per_vector,
        build_bytes=count * per_vector + block,
    )
    if count * dim <= FLAT_NUMBERS and flat.build_bytes <= max_memory:
        return flat

    per_vector = dim + 2 * HNSW_LINKS * 4 + _ID + 12  # 12: upper levels, offsets, level
    graph = Plan(
        family="hnsw",
        factory=f"IDMap2,HNSW{HNSW_LINKS}_SQ8",
        why="a graph is the fastest to query, and it fits",
        bytes_per_vector=per_vector,
        index_bytes=count * per_vector,
        build_bytes=count * per_vector + block + sample,
        parameter="efSearch",
        largest=min(count, 4096),
        oversample=2,
    )
    if count > HNSW_COUNT:
        not_graph = f"more than {HNSW_COUNT:,} are too many for a graph"
    elif graph.build_bytes > max_memory:
        not_graph = f"a graph needs {size(graph.build_bytes)}"
    elif gpu:
        not_graph = "the GPU builds inverted lists, not graphs"
    else:
        return graph

    per_vector = dim + _ID
    inverted = Plan(
        family="ivf-sq8",
        factory=f"IVF{lists},SQ8",
        why=f"{not_graph}; inverted lists of one byte a number fit",
        bytes_per_vector=per_vector,
        index_bytes=count * per_vector + centroids,
        build_bytes=count * per_vector + centroids + block + sample,
        parameter="nprobe",
        largest=lists,
        oversample=2,
    )
    if inverted.build_bytes > max_memory:
        raise RetrievalError(
            f"{count:,} vectors of {dim} numbers need {size(inverted.build_bytes)} for the "
            f"smallest index, --max-memory is {size(max_memory)}; give at least that much"
        )
    return inverted


def list_count(count: int) -> int:
    """Inverted lists for `count` vectors: the power of two nearest to 4 sqrt(count)."""
    return 1 << round(math.log2(4 * math.sqrt(max(count, 1))))


def parse_size(text: str) -> int:
    """ "4G", "512M" or a plain number of bytes -> bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text.upper())
    value = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if value == 0:
        raise ValueError(f"{text!r} is not a size above zero")
    return value


def size(number: int) -> str:
    """Bytes for people: "4.0 GB"."""
    value, unit = float(number), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{number} B"
