"""The solver reaches scikit-learn's optimum: objectives compared, not tolerances."""

from typing import Any

import numpy as np
import pytest
import torch
from clip_probe import ProbeError, fit_grid, solver
from clip_probe.adam import AdamSetting, fit_adam
from clip_probe.lbfgs import Sample, _cross_entropy
from clip_probe.solver import fit_grids
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch._subclasses.fake_tensor import FakeTensorMode

GRID = [1e-2, 1.0, 1e2, 1e4, 1e6]


def objective(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, c: float
) -> float:
    """scikit-learn's, written down apart from the code under test."""
    log_p = log_softmax(x @ weight.T + bias, axis=1)
    return float(-c * log_p[np.arange(len(y)), y].sum() + 0.5 * (weight**2).sum())


def features(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training features of length 1, their labels, test features."""
    data = load_digits()
    x, train = data.data, 700
    if kind == "few":  # fewer samples than features
        x, train = np.hstack([x, np.random.default_rng(1).normal(size=(len(x), 100))]), 50
    if kind == "offset":  # a mean far larger than the differences, as image embeddings have
        x = x + 100
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    if kind == "ill-conditioned":  # condition number of the covariance 1e8, axes mixed
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
        x = x @ (rotation * np.logspace(0, -4, 64)) @ rotation.T
    return x[:train], data.target[:train], x[train:]


@pytest.mark.parametrize("kind", ["plain", "few", "offset", "ill-conditioned"])
def test_optimum_equals_scikit_learn(kind: str) -> None:
    x, y, test = features(kind)
    fit = fit_grid(torch.tensor(x), torch.tensor(y), 10, GRID)
    assert fit.converged.all()
    for r, c in enumerate(GRID):
        weight, bias = fit.weight[r].numpy(), fit.bias[r].numpy()
        ours = objective(x, y, weight, bias, c)
        assert fit.objective[r].item() == pytest.approx(ours, rel=1e-9)
        theirs = LogisticRegression(C=c, solver="newton-cg", tol=1e-9, max_iter=1000).fit(x, y)
        expected = objective(x, y, theirs.coef_, theirs.intercept_, c)
        assert ours == pytest.approx(expected, rel=1e-6)
        same = (test @ weight.T + bias).argmax(1) == theirs.predict(test)
        assert same.mean() >= 0.999


def plain() -> tuple[torch.Tensor, torch.Tensor]:
    x, y, _ = features("plain")
    return torch.tensor(x), torch.tensor(y)


def test_a_grid_in_parts_equals_the_grid_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = plain()
    whole = fit_grid(x, y, 10, GRID)
    monkeypatch.setattr("clip_probe.solver.MAX_WEIGHTS", 2 * 65 * 10)
    monkeypatch.setattr("clip_probe.lbfgs.LOGITS_AT_ONCE", 1000)
    parts = fit_grid(x, y, 10, GRID)
    assert torch.allclose(whole.objective, parts.objective, rtol=1e-6)


@pytest.mark.parametrize("at_once", [2**20, 300])
def test_draws_of_different_sizes_and_grids_equal_each_alone(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Fewer rows than features, more, and as many; one grid for each."""
    x, y = plain()
    first = [(y == label).nonzero()[:, 0] for label in range(10)]
    data = [
        (x[rows], y[rows]) for rows in (torch.cat([f[:k] for f in first]) for k in (1, 20, 3, 6))
    ]
    grids = [[1.0, 1e4], [1e2], [1e-2, 1.0, 1e2], [1e6]]
    alone = [fit_grid(*rows, 10, grid) for rows, grid in zip(data, grids, strict=True)]
    monkeypatch.setattr("clip_probe.solver.MAX_WEIGHTS", at_once)
    for fit, expected in zip(fit_grids(data, 10, grids), alone, strict=True):
        assert fit.converged.all()
        assert fit.weight.shape == expected.weight.shape
        assert torch.allclose(fit.objective, expected.objective, rtol=1e-6)


@pytest.mark.parametrize("kind", ["many classes", "Fashion-MNIST's shape", "separable"])
def test_hard_features(kind: str) -> None:
    """Classes of unlike covariances that overlap; a separable set, whose loss goes to nothing."""
    samples, width, classes = {
        "many classes": (1000, 48, 25),
        "Fashion-MNIST's shape": (1500, 784, 10),  # the bench has all 60,000 rows
        "separable": (400, 64, 20),
    }[kind]
    random = np.random.default_rng(0)
    y = np.arange(samples + 1000) % classes
    spread = random.lognormal(sigma=0.5, size=(classes, width)) * np.arange(1, width + 1) ** -0.7
    far = 10 if kind == "separable" else 0.5
    means = far * spread * random.normal(size=(classes, width))
    x = means[y] + spread[y] * random.normal(size=(len(y), width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x, test, y = x[:samples], x[samples:], y[:samples]
    grid = [1e-1, 1e2, 1e5]
    fit = fit_grid(torch.tensor(x), torch.tensor(y), classes, grid)
    assert fit.converged.all()
    for r, c in enumerate(grid):
        weight, bias = fit.weight[r].numpy(), fit.bias[r].numpy()
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=20_000).fit(x, y)
        expected = objective(x, y, theirs.coef_, theirs.intercept_, c)
        assert objective(x, y, weight, bias, c) <= expected * (1 + 1e-6)
        same = (test @ weight.T + bias).argmax(1) == theirs.predict(test)
        assert same.mean() >= 0.999


def test_float32_features_are_solved_in_float64() -> None:
    x, y = plain()
    fit = fit_grid(x.float(), y, 10, [1.0])
    assert fit.weight.dtype == torch.float64
    assert fit.objective.item() == pytest.approx(fit_grid(x, y, 10, [1.0]).objective.item(), 1e-6)


def test_derivatives_stay_on_the_device() -> None:
    """Of a cuda device that is not there: shapes and devices are real, values are not."""
    with FakeTensorMode():
        rows = Sample(torch.empty(30, 5, device="cuda"), torch.empty(30, device="cuda").long())
        w = torch.empty(3, 4, 5, device="cuda")
        entropy, gradient, spread = _cross_entropy(rows, w)
    assert entropy.device.type == "cpu"
    assert gradient.device.type == spread.device.type == "cuda"
    assert (entropy.shape, gradient.shape, spread.shape) == ((3,), (3, 4, 5), (3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same() -> None:
    x, y = plain()
    settings = [AdamSetting(0.01, 10), AdamSetting(0.1, 5)]
    here, there = fit_grid(x, y, 10, GRID), fit_grid(x.cuda(), y.cuda(), 10, GRID)
    torch.testing.assert_close(there.objective, here.objective, rtol=1e-6, atol=0)
    for a, b in zip(
        fit_adam(x, y, 10, settings), fit_adam(x.cuda(), y.cuda(), 10, settings), strict=True
    ):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-3)


def test_one_class_has_nothing_to_separate() -> None:
    fit = fit_grid(torch.eye(3), torch.zeros(3, dtype=torch.int64), 1, [1.0])
    assert fit.converged.all()
    assert fit.objective.item() == 0.0


def test_a_small_problem_takes_one_thread_and_gives_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    together = solver._fit_together

    def watched(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return together(*arguments)

    monkeypatch.setattr(solver, "_fit_together", watched)
    torch.set_num_threads(2)
    fit_grid(*plain(), 10, [1.0])
    seen.append(torch.get_num_threads())
    torch.set_num_threads(1)
    assert seen == [1, 2]


def test_stopping_short_is_said() -> None:
    x, y = plain()
    assert not fit_grid(x, y, 10, [1e6], max_iterations=3).converged.any()


@pytest.mark.parametrize(
    ("x", "labels", "grid", "says"),
    [
        ([[0.0], [float("nan")]], [0, 1], [1.0], "not finite"),
        ([[0.0], [1.0]], [0, 0], [1.0], "a sample of each of 2 classes"),
        ([[0.0], [1.0]], [0, 2], [1.0], "a sample of each of 2 classes"),
        ([[0.0], [1.0]], [0, 1], [0.0], "C must be positive"),
    ],
)
def test_bad_input(x: list[list[float]], labels: list[int], grid: list[float], says: str) -> None:
    with pytest.raises(ProbeError, match=says):
        fit_grid(torch.tensor(x), torch.tensor(labels), 2, grid)
