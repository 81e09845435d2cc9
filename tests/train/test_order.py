"""The order of samples: exactly once, or each as probable, or by shares; the same from anywhere."""

import pickle
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from clip_train.config import TrainConfig
from clip_train.order import (
    Mixture,
    Order,
    Replacement,
    Stream,
    derive_seed,
    extend_hash,
    make_stream,
    permutation,
)
from clip_train.shards import Data
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

shard_counts = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
factors = st.floats(0.01, 100)


class Short(Mixture):
    """A mixture whose blocks a test can see several of."""

    LENGTH = 16


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Any stream over a few small shards, empty ones anywhere."""
    window, seed = draw(st.integers(1, 4)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from([Order, Replacement]))
    if not draw(st.booleans()):
        return kind(draw(shard_counts), seed, window)
    sources = draw(st.lists(shard_counts, min_size=1, max_size=4))
    return Short(
        [count for source in sources for count in source],
        seed,
        window,
        sources=[len(source) for source in sources],
        weights=[draw(factors) for _ in sources],
        kind=kind,
    )


@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 100))
def test_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed, epoch)) == list(range(n))


@given(shard_counts, st.integers(0, 99), st.integers(1, 12), st.integers(0, 3))
def test_each_epoch_holds_every_sample_once(
    counts: list[int], seed: int, window: int, epoch: int
) -> None:
    order = Order(counts, seed, window)
    n = sum(counts)
    assert len(order) == n
    assert sorted(order.samples(epoch * n, (epoch + 1) * n)) == list(range(n))


@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "counts", [[0, 0, 3, 4], [3, 4, 0, 0], [0, 0, 0, 2, 0, 0, 0], [5, 0, 0, 0, 0, 5], [0, 1]]
)
def test_empty_shards_anywhere(counts: list[int], window: int) -> None:
    n = sum(counts)
    for seed in range(20):  # so that all of a window is empty in some
        drawn = Order(counts, seed, window).samples(0, 3 * n).reshape(3, n)
        assert (np.sort(drawn) == np.arange(n)).all()
        drawn = Replacement(counts, seed, window).samples(0, 3 * n)
        assert drawn.min() >= 0
        assert drawn.max() < n


@settings(max_examples=100)
@given(streams(), st.lists(st.integers(0, 120), max_size=8), st.integers(0, 120))
def test_any_split_is_the_stream(stream: Stream, cuts: list[int], start: int) -> None:
    whole = stream.samples(0, 120)
    assert len(whole) == 120
    assert all(0 <= sample < len(stream) for sample in whole)
    bounds = [0, *sorted(cuts), 120]
    pieces = [stream.samples(a, b) for a, b in pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    resumed: Stream = pickle.loads(pickle.dumps(stream))  # a spawned loader, entering anywhere
    np.testing.assert_array_equal(resumed.samples(start, 120), whole[start:])


@given(streams(), st.integers(0, 2**40))
def test_enters_anywhere(stream: Stream, position: int) -> None:
    """Nothing before the position is computed: an epoch in the billions takes no longer."""
    sample = int(stream.samples(position, position + 1)[0])
    shard, row = stream.place(sample)
    assert 0 <= row < stream.counts[shard]
    assert sample == stream.counts[:shard].sum() + row


@given(streams(), st.integers(0, 5))
def test_processes_share_the_stream(stream: Stream, first: int) -> None:
    """A run on 2, then 1, then 4 processes sees the samples of one that was never cut."""
    size, seen = 8, list[int]()
    for step, world in zip(range(first, first + 6), (2, 2, 1, 1, 4, 4), strict=True):
        share = size // world
        for rank in range(world):  # as in loader.Batches
            start = step * size + rank * share
            seen += stream.samples(start, start + share).tolist()
    assert seen == stream.samples(first * size, (first + 6) * size).tolist()


def test_a_window_reads_few_shards() -> None:
    order = Order([100] * 12, seed=0, window=3)
    for start in range(0, 1200, 300):
        shards = {order.place(int(s))[0] for s in order.samples(start, start + 300)}
        assert len(shards) == 3


def test_epochs_and_seeds_differ() -> None:
    first = Order([50, 50], 0, 2)
    assert not np.array_equal(first.samples(0, 100), first.samples(100, 200))
    assert not np.array_equal(first.samples(0, 100), Order([50, 50], 1, 2).samples(0, 100))


def test_order_looks_random() -> None:
    """Mean displacement of a random permutation is n / 3, and neighbours are rarely kept."""
    n = 10_000
    drawn = permutation(n, 7, 1)
    assert np.abs(drawn - np.arange(n)).mean() == pytest.approx(n / 3, rel=0.03)
    assert (np.diff(drawn) == 1).sum() < 10


def test_place_skips_empty_shards() -> None:
    order = Order([2, 0, 3], 0, 1)
    assert [order.place(s) for s in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("window", [1, 2, 9])
def test_replacement_draws_every_sample_equally(window: int) -> None:
    """One position of each block: those within a block share its shards."""
    counts = [1, 9, 0, 3, 6, 2]
    stream = Replacement(counts, 3, window)
    assert stream.all_fit == (window == 9)
    blocks = [stream.block(number) for number in range(4000)]
    for position in (0, stream.length - 1):
        drawn = np.bincount([block[position] for block in blocks], minlength=21)
        assert chisquare(drawn).pvalue > 0.01


def test_replacement_draws_independently_where_all_fits() -> None:
    stream = Replacement([4, 1, 5], 0, window=3)
    drawn = stream.samples(0, 10_001)
    pairs = np.bincount(drawn[:-1] * 10 + drawn[1:], minlength=100)
    assert chisquare(pairs).pvalue > 0.01


def test_a_block_of_replacement_reads_few_shards() -> None:
    stream = Replacement([100] * 12, seed=0, window=3)
    assert stream.length == 300
    for number in range(5):
        assert len(np.unique(stream.shards_of(stream.block(number)))) <= 3


def test_mixture_shows_each_source_as_its_own_order_would() -> None:
    counts, sources, weights = [5, 0, 7, 20, 30, 3], [3, 2, 1], [2.0, 1.0, 5.0]
    stream = Mixture(counts, 4, 6, sources=sources, weights=weights)
    drawn = stream.samples(0, 5000)
    for number, (first, n) in enumerate([(0, 12), (12, 50), (62, 3)]):
        own = drawn[(drawn >= first) & (drawn < first + n)] - first
        whole_epochs = own[: len(own) // n * n].reshape(-1, n)
        assert len(whole_epochs) > 10
        assert (np.sort(whole_epochs) == np.arange(n)).all()
        np.testing.assert_array_equal(own, stream.sources[number].samples(0, len(own)))


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-6, 1e6)), min_size=1, max_size=6))
def test_mixture_keeps_its_shares(sources: list[tuple[int, float]]) -> None:
    """At every block's end, to within a few samples, and no source is ever lost."""
    counts, weights = zip(*sources, strict=True)
    stream = Mixture(counts, 0, 8, sources=[1] * len(counts), weights=weights)
    amounts = [Fraction(w) * n for n, w in sources]
    before = [0] * len(counts)
    for number in (0, 1, 2, 3, 50, 10**9, 10**15):
        drawn = stream.drawn(number)
        assert sum(drawn) == number * 1000
        assert all(now >= then for now, then in zip(drawn, before, strict=True))
        for amount, count in zip(amounts, drawn, strict=True):
            assert abs(count - number * 1000 * amount / sum(amounts)) < len(counts)
        before = drawn


def test_mixture_spreads_its_sources() -> None:
    """Which positions of a block a source has is random, another time in each block."""
    stream = Mixture([300, 100], 0, 2, sources=[1, 1], weights=[1, 1])
    second = stream.samples(0, 4000).reshape(4, 1000) >= 300
    assert second.sum(1).tolist() == [250] * 4
    assert (np.abs(second.reshape(4, 10, 100).sum(2) - 25) < 15).all()
    assert not (second[0] == second[1]).all()


def test_mixture_shares_out_the_window() -> None:
    sources = [20, 20, 20]
    stream = Mixture([50] * 60, 0, 8, sources=sources, weights=[4, 3, 0.1])
    assert [source.window for source in stream.sources] == [5, 3, 1]
    for number in range(20):  # a block may end in other windows than it began in
        shards = np.unique(stream.shards_of(stream.block(number)[:50]))
        assert len(shards) <= 2 * 9


def test_shares_are_open_clips(tmp_path: Path) -> None:
    """`--train-data-upsampling-factors`: it draws shards, each as probable as its factor."""
    from open_clip_train.data import expand_urls

    urls, weights = expand_urls(f"{tmp_path}/a/{{0..3}}.tar::{tmp_path}/b/{{0..1}}.tar", "1::3")
    by_source = [sum(w for u, w in zip(urls, weights, strict=True) if f"/{s}/" in u) for s in "ab"]
    stream = Mixture([10] * 6, 0, 16, sources=[4, 2], weights=[1, 3])
    assert stream.drawn(1) == [1000 * share / sum(by_source) for share in by_source]


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("weights", [None, [2.0, 1.0]])
def test_make_stream(weights: list[float] | None, replacement: bool) -> None:
    config = TrainConfig(
        model="XS",
        train_data="a::b",
        output=Path("run"),
        samples_seen=100,
        batch_size=10,
        warmup=1,
        seed=3,
        shuffle_shards=2,
        replacement=replacement,
    )
    shards = [Path(f"{i}.tar") for i in range(3)]
    stream = make_stream(Data(shards, [4, 3, 5], [1, 2], weights, "", None), config)
    kind = Replacement if replacement else Order
    expected = kind([4, 3, 5], 3, 2)
    if weights:
        expected = Mixture([4, 3, 5], 3, 2, sources=[1, 2], weights=weights, kind=kind)
        assert {type(source) for source in expected.sources} == {kind}
    assert type(stream) is type(expected)
    np.testing.assert_array_equal(stream.samples(0, 50), expected.samples(0, 50))


def test_golden_values() -> None:
    """Fixed for good: a change would break the resumption of every run in progress."""
    assert derive_seed(0, 1) == 8482747048757055080
    first, second = [6, 8, 7, 4, 10, 5, 9, 11, 0, 1, 3, 2], [6, 7, 8, 10, 4, 9, 5, 11, 1, 0, 2, 3]
    assert Order([4, 3, 5], 1, 2).samples(0, 24).tolist() == first + second
    drawn = [10, 11, 7, 11, 7, 9, 10, 11, 5, 10, 6, 8]
    assert Replacement([4, 3, 5], 1, 2).samples(0, 12).tolist() == drawn
    drawn = [4, 4, 3, 2, 5, 3, 1, 10, 0, 6, 5, 3]
    assert Replacement([4, 3, 5], 1, 3).samples(0, 12).tolist() == drawn
    mixture = Mixture([4, 3, 5], 1, 2, sources=[1, 2], weights=[2, 1])
    drawn = [4, 0, 5, 6, 9, 8, 3, 7, 10, 0, 11, 7]  # across two blocks
    assert mixture.samples(995, 1007).tolist() == drawn


def test_hash_depends_on_order_and_chains() -> None:
    one = extend_hash("", np.array([1, 2, 3]))
    assert one != extend_hash("", np.array([2, 1, 3]))
    assert extend_hash(one, np.array([4])) != extend_hash("", np.array([1, 2, 3, 4]))
