"""The plan as a table, and sizes as people write them."""

import pytest
from clip_retrieval import RetrievalError
from clip_retrieval.plan import list_count, parse_size, plan_index

GB = 1 << 30


@pytest.mark.parametrize(
    ("count", "dim", "memory", "gpu", "family", "bytes_per_vector"),
    [
        (1, 512, 4 * GB, False, "flat", 2056),
        (32_768, 512, 4 * GB, False, "flat", 2056),
        (32_768, 512, 4 * GB, True, "flat", 2056),
        (200_000, 64, 4 * GB, False, "flat", 264),
        (32_769, 512, 4 * GB, False, "hnsw", 788),
        (1_000_000, 512, 4 * GB, False, "hnsw", 788),
        (1_000_000, 512, 5 * GB // 4, False, "ivf-sq8", 520),
        (1_000_000, 512, 4 * GB, True, "ivf-sq8", 520),
        (6_000_000, 512, 40 * GB, False, "ivf-sq8", 520),
    ],
)
def test_plan(
    count: int, dim: int, memory: int, gpu: bool, family: str, bytes_per_vector: int
) -> None:
    plan = plan_index(count, dim, max_memory=memory, gpu=gpu)
    assert (plan.family, plan.bytes_per_vector) == (family, bytes_per_vector)
    assert plan.index_bytes <= plan.build_bytes <= memory
    assert (plan.parameter is None) == (family == "flat")


def test_too_little_memory_is_one_line() -> None:
    with pytest.raises(RetrievalError, match=r"1,000,000 vectors .* --max-memory is 64.0 MB"):
        plan_index(1_000_000, 512, max_memory=64 << 20)


def test_list_count() -> None:
    assert [list_count(n) for n in (1, 1000, 1_000_000)] == [4, 128, 4096]


def test_sizes() -> None:
    assert [parse_size(t) for t in ("4G", "512m", "1.5K", "7")] == [4 * GB, 512 << 20, 1536, 7]
    for text in ("", "four", "0", "-1G", "4GiB", "inf", "nan"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)
