"""The plan as a table, and sizes as people write them."""

import pytest
from clip_retrieval import RetrievalError
from clip_retrieval.plan import FAMILIES, list_count, parse_size, plan_index

GB = 1 << 30


@pytest.mark.parametrize(
    ("count", "dim", "memory", "gpu", "family", "bytes_per_vector"),
    [
        (1, 512, 4 * GB, False, "flat", 2056),
        (32_768, 512, 4 * GB, False, "flat", 2056),
        (32_768, 512, 4 * GB, True, "flat", 2056),
        (200_000, 64, 4 * GB, False, "flat", 264),
        (32_769, 512, 4 * GB, False, "ivf-pq", 136),
        (1_000_000, 512, 4 * GB, False, "ivf-pq", 136),
        (100_000, 511, 4 * GB, False, "ivf-sq8", 519),
        (1_000_000, 512, 4 * GB, True, "ivf-sq8", 520),
        (100_000_000, 512, 12 * GB, False, "rabitq", 80),
        (100_000_000, 512, 6 * GB, False, "on-disk", 1),
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
    with pytest.raises(RetrievalError, match=r"on-disk.* needs .* --max-memory is 64.0 MB"):
        plan_index(1_000_000, 512, max_memory=64 << 20)


def test_list_count() -> None:
    assert [list_count(n) for n in (1, 12, 33, 1000, 1_000_000)] == [1, 4, 16, 128, 4096]


def test_sizes() -> None:
    assert [parse_size(t) for t in ("4G", "512m", "1.5K", "7")] == [4 * GB, 512 << 20, 1536, 7]
    for text in ("", "four", "0", "-1G", "4GiB", "inf", "nan"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_asked_for(family: str) -> None:
    plan = plan_index(100_000, 512, max_memory=4 * GB, family=family)
    assert plan.family == family
    with pytest.raises(RetrievalError, match=f"the index \\({family}: asked for\\) needs"):
        plan_index(100_000, 512, max_memory=1 << 20, family=family)


def test_a_recall_of_one_is_exact() -> None:
    assert plan_index(1_000_000, 512, max_memory=4 * GB, target=1).family == "flat"
    with pytest.raises(RetrievalError, match="a recall of 1 takes exact search"):
        plan_index(1_000_000, 512, max_memory=GB, target=1)
