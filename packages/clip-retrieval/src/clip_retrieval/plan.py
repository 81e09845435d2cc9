"""Which index to build, and why: a pure function of count, width, memory, target and device."""

# D embedding width

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from clip_retrieval.errors import RetrievalError

FAMILIES = ("flat", "hnsw", "ivf-sq8", "ivf-pq", "rabitq", "on-disk")
FLAT_NUMBERS = 1 << 24  # 64 MB of float32: one exact query takes about 10 ms on one core
HNSW_LINKS = 32  # M of the graph; its bottom level keeps 2 M links of 4 bytes a vector
TRAIN_PER_LIST = 40  # vectors per k-means centroid
_FEW_PER_LIST = 12  # where memory is short; the codes of the on-disk family need no training
BLOCK_ROWS = 1 << 14  # rows on their way into the index at a time, as float32
DISK_ROWS = 1 << 18  # rows whose lists are built in memory before they go to the disk

_PAIR_CODES = 16  # of 4 bits, learnt for each pair of numbers
_RANGE_ROWS = 10_000  # to find the range of each number of a graph's vectors
_ID = 8  # bytes of a row number
_WIDER = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # candidates per hit, from rough codes


@dataclass(frozen=True)
class Plan:
    """A choice of index.

    Attributes:
        family: one of FAMILIES.
        factory: FAISS's own description of it.
        why: a few words, for people.
        bytes_per_vector: in memory, row number included.
        index_bytes: the whole index in memory.
        build_bytes: the peak while building, the index included.
        lists: inverted lists; 0 without.
        train_rows: the random sample that it is trained on.
        parameter: the search's knob to be tuned ("efSearch", "nprobe"); None when exact.
        largest: the largest value of that knob.
        candidates: how many per hit the codes may be asked for, least first; all are scored from
            the float16 rows.
    """

    family: str
    factory: str
    why: str
    bytes_per_vector: int
    index_bytes: int
    build_bytes: int
    lists: int = 0
    train_rows: int = 0
    parameter: str | None = None
    largest: int = 1
    candidates: tuple[int, ...] = (1,)


def plan_index(
    count: int,
    dim: int,
    *,
    max_memory: int,
    target: float = 0.95,
    gpu: bool = False,
    family: str | None = None,
) -> Plan:
    """Choose the index of `count` vectors of `dim` numbers within `max_memory` bytes.

    Small sets are compared exactly, and so are all where the target is 1. Larger ones get
    inverted lists: of 4-bit product codes, two bits per number, which are the fastest; of one bit
    per number where memory is short; of one byte per number on the disk where even that does not
    fit. A GPU builds lists of one byte per number. What the codes find is
    scored exactly from the float16 rows.

    Args:
        family: instead of the choice.

    Raises:
        RetrievalError: the family, or even the smallest, does not fit.
    """
    if family:
        plan = _PLANS[family](count, dim, "asked for")
        return _fitting([plan], max_memory)
    if target >= 1:
        return _fitting([_flat(count, dim, "a recall of 1 takes exact search")], max_memory)
    if count * dim <= FLAT_NUMBERS and _flat(count, dim, "").build_bytes <= max_memory:
        return _flat(count, dim, "few enough to compare with every one, exactly")
    if gpu:
        choice = [_ivf_sq8(count, dim, "the GPU builds and searches lists of one byte a number")]
    elif dim % 2 == 0:
        choice = [_ivf_pq(count, dim, "two bits a number are the fastest to search, and fit")]
    else:
        choice = [_ivf_sq8(count, dim, "an odd width has no pairs for product codes")]
    short = f"{choice[0].family} needs {size(choice[0].build_bytes)}"
    choice.append(_rabitq(count, dim, f"{short}; one bit a number fits"))
    choice.append(_on_disk(count, dim, f"{short}; so the lists stay on the disk"))
    return _fitting(choice, max_memory)


def _fitting(plans: list[Plan], max_memory: int) -> Plan:
    for plan in plans:
        if plan.build_bytes <= max_memory:
            return plan
    smallest = min(plans, key=lambda plan: plan.build_bytes)
    raise RetrievalError(
        f"the index ({smallest.family}: {smallest.why}) needs {size(smallest.build_bytes)}, "
        f"--max-memory is {size(max_memory)}; give at least that much"
    )


def _flat(count: int, dim: int, why: str) -> Plan:
    per_vector = 4 * dim + _ID
    return Plan(
        family="flat",
        factory="IDMap,Flat",
        why=why,
        bytes_per_vector=per_vector,
        index_bytes=count * per_vector,
        build_bytes=count * per_vector + _block(count, dim),
    )


def _hnsw(count: int, dim: int, why: str) -> Plan:
    per_vector = dim + 2 * HNSW_LINKS * 4 + 12 + _ID  # 12: upper levels, offsets, level
    return Plan(
        family="hnsw",
        factory=f"IDMap,HNSW{HNSW_LINKS}_SQ8",
        why=why,
        bytes_per_vector=per_vector,
        index_bytes=count * per_vector,
        build_bytes=count * per_vector + _block(count, dim),
        train_rows=min(count, _RANGE_ROWS),
        parameter="efSearch",
        largest=min(count, 4096),
        candidates=(2,),
    )


def _inverted(
    family: str,
    code: str,
    per_vector: int,
    count: int,
    dim: int,
    why: str,
    candidates: tuple[int, ...],
) -> Plan:
    """Lists: a memory of codes and centroids; building, the k-means and then the codes."""
    lists = list_count(count)
    centroids = lists * dim * 4
    index_bytes = count * per_vector + centroids
    if family == "ivf-pq":  # whose lists are padded to blocks of 32 codes
        index_bytes += 16 * lists * (per_vector - _ID)
    # the sample as float32, and FAISS's residuals of it: 2.5 times the sample as measured
    train_rows = min(count, TRAIN_PER_LIST * lists)
    training = train_rows * dim * 10 + 2 * centroids
    return Plan(
        family=family,
        factory=code.format(lists=lists, pairs=dim // 2),
        why=why,
        bytes_per_vector=per_vector,
        index_bytes=index_bytes,
        build_bytes=max(training, index_bytes + _block(count, dim)),
        lists=lists,
        train_rows=train_rows,
        parameter="nprobe",
        largest=lists,
        candidates=candidates,
    )


def _ivf_sq8(count: int, dim: int, why: str) -> Plan:
    return _inverted("ivf-sq8", "IVF{lists},SQ8", dim + _ID, count, dim, why, (2,))


def _ivf_pq(count: int, dim: int, why: str) -> Plan:
    if dim % 2:
        raise RetrievalError(f"ivf-pq codes pairs of numbers, the width is {dim}; take ivf-sq8")
    if count < 2 * _PAIR_CODES:  # as many as half of the rows may be held out
        raise RetrievalError(
            f"ivf-pq learns its codes from {2 * _PAIR_CODES} rows or more, there are {count}; "
            "take flat"
        )
    per_vector = -(-dim // 4) + _ID
    return _inverted("ivf-pq", "IVF{lists},PQ{pairs}x4fs", per_vector, count, dim, why, _WIDER)


def _rabitq(count: int, dim: int, why: str) -> Plan:
    per_vector = -(-dim // 8) + 8 + _ID  # 8: two factors of the estimate
    return _inverted("rabitq", "IVF{lists},RaBitQ", per_vector, count, dim, why, _WIDER)


def _on_disk(count: int, dim: int, why: str) -> Plan:
    lists = list_count(count)
    plan = _ivf_sq8(count, dim, why)
    memory = lists * dim * 4 + lists * 24  # centroids; where each list lies
    some = _ivf_sq8(min(count, DISK_ROWS), dim, why).index_bytes
    train_rows = min(count, _FEW_PER_LIST * lists)
    training = train_rows * dim * 10 + memory
    return Plan(
        family="on-disk",
        factory=plan.factory,
        why=why,
        bytes_per_vector=-(-memory // max(count, 1)),
        index_bytes=memory,
        build_bytes=max(training, some + memory + _block(count, dim)),
        lists=lists,
        train_rows=train_rows,
        parameter="nprobe",
        largest=lists,
        candidates=plan.candidates,
    )


_PLANS: dict[str, Callable[[int, int, str], Plan]] = dict(
    zip(FAMILIES, (_flat, _hnsw, _ivf_sq8, _ivf_pq, _rabitq, _on_disk), strict=True)
)


def _block(count: int, dim: int) -> int:
    return min(count, BLOCK_ROWS) * dim * 4


def list_count(count: int) -> int:
    """Inverted lists for `count` vectors: the power of two nearest to 4 sqrt(count).

    They are no more than half of the vectors, which train them.
    """
    nearest = round(math.log2(4 * math.sqrt(max(count, 1))))
    return 1 << min(nearest, max(count // 2, 1).bit_length() - 1)


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
