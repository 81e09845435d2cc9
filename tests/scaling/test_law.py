"""Laws that are known, recovered; intervals that cover; choices of points beside slow oracles."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fits import NO_LAW, compare, describe, fit_points, hold_out, verdict
from hypothesis import given
from hypothesis import strategies as st
from law import Law, interval, least_squares, select
from points import Point
from saturating import saturating
from scipy.stats import linregress
from settings import Settings

Make = Callable[..., tuple[Point, ...]]
RULES = ("binned", "pareto", "all")


def law_of(runs: tuple[Point, ...], **settings: object) -> Law:
    return Law("q", "all", runs, Settings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@given(
    prefactor=st.floats(0.5, 500),
    exponent=st.floats(-0.6, -0.01),
    decades=st.floats(1, 8),
)
def test_a_noiseless_law_is_recovered(
    make_runs: Make, rule: str, prefactor: float, exponent: float, decades: float
) -> None:
    compute = 10 ** (9 + decades * np.arange(5) / 4)
    law = law_of(make_runs(compute, prefactor * compute**exponent), points=rule)
    assert law.line is not None
    assert law.line[1] == pytest.approx(exponent, rel=1e-9)
    assert 10 ** law.line[0] == pytest.approx(prefactor, rel=1e-7)


def test_binned_recovers_a_law_whose_runs_sit_at_the_centres(make_runs: Make) -> None:
    """Beside the runs at the centres, worse ones at both ends that only set the range."""
    edges = np.linspace(9, 14, 6)
    centres = 10 ** ((edges[:-1] + edges[1:]) / 2)
    compute = np.concatenate([centres, 10.0 ** np.array([9, 13.9])])
    error = 5.86 * compute**-0.11
    error[5:] *= 1.5
    law = law_of(make_runs(compute, error), points="binned")
    assert law.line == pytest.approx((np.log10(5.86), -0.11), rel=1e-9)


@pytest.mark.parametrize("rule", RULES)
@given(factor=st.floats(1e-6, 1e12))
def test_the_exponent_does_not_hang_on_the_unit_of_compute(
    make_runs: Make, rule: str, factor: float
) -> None:
    rng = np.random.default_rng(3)
    compute = 10 ** rng.uniform(9, 13, 20)
    error = 5 * compute**-0.12 * np.exp(0.1 * rng.standard_normal(20))
    one = law_of(make_runs(compute, error), points=rule)
    other = law_of(make_runs(compute * factor, error), points=rule)
    assert one.line is not None
    assert other.line is not None
    assert other.line[1] == pytest.approx(one.line[1], abs=1e-9)


def test_least_squares_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(9, 13, (4, 12)), rng.standard_normal((4, 12))
    height, slope, _ = least_squares(x, y, np.zeros((4, 12), int))
    oracle = [linregress(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(slope, [o.slope for o in oracle], rtol=1e-10)
    np.testing.assert_allclose(height, [o.intercept for o in oracle], rtol=1e-10)


@given(st.integers(0, 10_000), st.integers(1, 25), st.booleans())
def test_choices_of_points_are_those_of_loops(seed: int, runs: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(9, 13, runs), rng.uniform(-1, 0, runs)
    if ties:
        x, y = np.round(x), np.round(y, 1)
    got = select(x[None], y[None], "pareto", 5, 0.1)
    best = {
        (a, b)
        for a, b in zip(x, y, strict=True)
        if not any((c <= a and d < b) or (c < a and d <= b) for c, d in zip(x, y, strict=True))
    }
    used = got[2][0] >= 0
    assert set(zip(got[0][0][used], got[1][0][used], strict=True)) == best
    assert [x[r] for r in got[2][0][used]] == list(got[0][0][used])

    got = select(x[None], y[None], "binned", 5, 0.1)
    edges = np.linspace(x.min(), x.max() + 0.1, 6)  # the authors' way: numpy's own bins
    places = np.digitize(x, edges)
    for k in range(5):
        inside = y[places == k + 1]
        if (got[2][0][k] >= 0) != bool(len(inside)):  # a run on an edge, up to rounding
            assert np.abs(x[:, None] - edges).min() < 1e-9
            return
        if len(inside):
            assert got[0][0][k] == pytest.approx((edges[k] + edges[k + 1]) / 2)
            assert got[1][0][k] == inside.min()


@pytest.mark.slow
@pytest.mark.parametrize("runs", [8, 12, 29])
def test_intervals_cover_the_truth_in_95_of_100(make_runs: Make, runs: int) -> None:
    """2,000 simulated tables of one law, the computes of a grid, runs scattering by 3%."""
    rng = np.random.default_rng(runs)
    tables, covered, predicted = 2000, 0, 0
    compute = 10 ** np.linspace(10, 13, runs)
    for table in range(tables):
        error = 5.86 * compute**-0.11 * np.exp(0.03 * rng.standard_normal(runs))
        law = law_of(make_runs(compute, error), points="all", bootstrap=1000, seed=table)
        assert law.replicates is not None
        low, high = interval(law.replicates[1], runs)
        covered += low <= -0.11 <= high
        ends = law.interval_at(13.5)
        assert ends is not None
        predicted += ends[0] <= 5.86 * 10 ** (13.5 * -0.11) <= ends[1]
    assert 0.93 <= covered / tables <= 0.97
    assert 0.93 <= predicted / tables <= 0.97


def test_below_five_there_is_no_interval(make_runs: Make) -> None:
    compute = 10.0 ** np.arange(9, 13)
    points = make_runs(compute, compute**-0.1)
    about = describe(law_of(points, points="all"))
    assert about["interval_95"] is None
    assert "needs 5" in about["no_interval"]
    assert about["verdict"] == "too few points to say"
    # five runs, of which a frontier of four carries the law
    points += make_runs(compute[-1:] * 2, np.array([0.9]))
    assert describe(law_of(points, points="pareto"))["interval_95"] is None
    assert describe(law_of(points, points="all"))["interval_95"] is not None


def test_noise_is_no_power_law(make_runs: Make) -> None:
    """The frontier of noise goes down as well; the tool is not taken in."""
    compute = 10 ** np.tile(np.linspace(10, 13, 9), 3)
    taken_in = 0
    for seed in range(60):
        error = 0.4 * np.exp(0.1 * np.random.default_rng(seed).standard_normal(27))
        word, why = verdict(law_of(make_runs(compute, error), bootstrap=400))
        assert why
        taken_in += word != NO_LAW and not word.startswith("too few")
    assert taken_in <= 3  # one in forty would be by chance


def test_the_errors_that_rise_are_no_power_law(make_runs: Make) -> None:
    compute = 10 ** np.linspace(10, 13, 9)
    points = make_runs(compute, 0.1 * compute**0.03)
    for rule in RULES:
        about = describe(law_of(points, points=rule, bootstrap=200))
        assert about["verdict"] == NO_LAW
    assert describe(law_of(points, points="pareto"))["exponent"] is None  # one run is best


def test_runs_of_nearly_one_compute_make_no_line(make_runs: Make) -> None:
    compute = 1e12 * 10 ** np.array([0, 0.0051, 0.0102])
    about = describe(law_of(make_runs(compute, np.array([0.9, 0.5, 0.01])), points="all"))
    assert about["exponent"] is None
    apart = make_runs(1e12 * np.array([1, 1.05, 1.1]), np.array([0.9, 0.5, 0.01]))
    about = describe(law_of(apart, points="all"))  # steep: a prefactor beyond any float
    assert about["prefactor"] == 1e308
    (low,) = make_runs(np.array([1e9]), np.array([0.9]))
    assert (
        hold_out(law_of((*make_runs(compute, compute**-0.1), *apart[2:]), points="all"), 1) is None
    )
    assert describe(law_of((low, *apart), points="all", holdout_largest=1))["holdout"]


def test_n_eval_widens_the_interval(make_runs: Make) -> None:
    compute = 10 ** np.linspace(10, 13, 12)
    error = 5.86 * compute**-0.11
    exact = law_of(make_runs(compute, error), points="all")
    counted = law_of(make_runs(compute, error, n_eval=500), points="all")
    assert exact.replicates is not None
    assert counted.replicates is not None
    assert np.std(exact.replicates[1]) < 1e-9
    # the slope's error from the binomial one of log10 E at 500 samples, to first order
    spread = np.sqrt((1 - error) / (error * 500)) / np.log(10)
    x = np.log10(compute)
    expected = np.sqrt((((x - x.mean()) * spread) ** 2).sum()) / ((x - x.mean()) ** 2).sum()
    assert np.std(counted.replicates[1]) == pytest.approx(expected, rel=0.25)


def test_a_floor_is_found_and_a_missing_one_not_claimed(make_runs: Make) -> None:
    compute = 10 ** np.linspace(9, 14, 12)
    found = saturating(law_of(make_runs(compute, 0.15 + 50 * compute**-0.2), points="all"))
    assert found["identifiable"]
    assert found["floor"] == pytest.approx(0.15, rel=1e-5)
    assert found["exponent"] == pytest.approx(-0.2, rel=1e-4)
    straight = saturating(law_of(make_runs(compute, 5 * compute**-0.1), points="all"))
    assert not straight["identifiable"]
    noise = np.exp(0.03 * np.random.default_rng(0).standard_normal(12))
    noisy = saturating(law_of(make_runs(compute, 5 * compute**-0.1 * noise), points="all"))
    assert not noisy["identifiable"]
    assert not saturating(law_of(make_runs(compute[:4], compute[:4] ** -0.1)))["identifiable"]


def test_held_out_runs_are_predicted_from_the_others(make_runs: Make) -> None:
    compute = 10 ** np.linspace(10, 13, 8)
    points = make_runs(compute, 5 * compute**-0.1)
    wrong = replace(points[7], error=0.9)
    held = hold_out(law_of((*points[:7], wrong), points="all"), 1)
    assert held is not None
    assert [row["run"] for row in held] == ["run 7"]
    assert held[0]["measured"] == 0.9
    assert held[0]["error"] == pytest.approx(points[7].error)
    assert held[0]["beyond"] == pytest.approx(3 / 7)
    assert hold_out(law_of(points), 6) is None


def test_groups_that_differ_are_told_apart(make_runs: Make) -> None:
    rng = np.random.default_rng(1)
    compute = 10 ** np.linspace(10, 13, 15)

    def group(name: str, exponent: float) -> list[Point]:
        error = compute**exponent * 3 * np.exp(0.02 * rng.standard_normal(15))
        return [replace(p, group=name) for p in make_runs(compute, error)]

    settings = Settings(points="all", bootstrap=500)
    laws = [
        Law("q", name, tuple(group(name, b)), settings)
        for name, b in (("a", -0.10), ("b", -0.10), ("c", -0.16))
    ]
    differ = {tuple(row["groups"]): row["differ"] for row in compare(laws)}
    assert differ == {("a", "b"): False, ("a", "c"): True, ("b", "c"): True}


def test_the_same_seed_gives_the_same_fit_whatever_stands_beside_it(make_runs: Make) -> None:
    compute = 10 ** np.linspace(10, 13, 9)
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(9))
    points = list(make_runs(compute, 5 * compute**-0.1 * noise))
    others = [replace(p, quantity="other") for p in points]
    alone = fit_points(points, Settings(bootstrap=200, points="all"))
    beside = fit_points(others + points, Settings(bootstrap=200, points="all"))
    assert alone["fits"][0] == beside["fits"][1]
    again = fit_points(points, Settings(bootstrap=200, points="all", seed=1))
    assert alone["fits"][0]["interval_95"] != again["fits"][0]["interval_95"]
