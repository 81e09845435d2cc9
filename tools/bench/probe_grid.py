"""Grids of linear probes: ours against scikit-learn's LogisticRegression and CLIP_benchmark's fits.

uv run tools/bench/probe_grid.py                          full data: 50,000 rows, ten values of C
uv run tools/bench/probe_grid.py --draws 10 --rows 1600   few shots: 16 rows a class, ten draws
uv run tools/bench/probe_grid.py --peer clip_benchmark    its twenty fits, one after another
uv run tools/bench/probe_grid.py --rows 60000 --width 784 --classes 10    Fashion-MNIST's size

Features of length 1 in classes whose covariances differ in size and in shape and which overlap
(--overlap). Every side gets the same float32 features; scikit-learn fits in float64, with
--peer-threads of BLAS and otherwise its defaults, but for as many iterations as it needs (it stops
at 100, with a warning, where C is large). An equal gradient tolerance is not an equal solution:
the objective of every C is computed apart from both sides in float64, and the script fails where
ours is higher, or where the best test accuracy is lower by more than 0.1 point.

CLIP_benchmark's side is its train() as it stands (metrics/linear_probe.py, 1.6.2) on a CPU: AdamW,
lr 0.1, 10 epochs, batch 64, a row-wise DataLoader without workers, once for each of the twenty
weight decays its search visits at most; ours is then fit_grid over the grid of C.
Time of --fits of them is scaled to twenty.
"""

import json
import resource
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import torch
from clip_probe.solver import fit_grids
from interleaved import compare
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

TEST_ROWS = 5000
FITS = 20  # 7 + 12 of its search, and the last
Array = np.ndarray[Any, Any]
Found = list[tuple[Array, Array, float]]  # weight [C, D], bias [C], C; by draw and C


def make(rows: int, width: int, classes: int, overlap: float, seed: int) -> tuple[Array, Array]:
    """Rows of length 1 and their labels; the last TEST_ROWS are for testing."""
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -0.5
    means = random.normal(size=(classes, width)) * spectrum / overlap
    sizes = np.exp(0.4 * random.normal(size=classes))
    own = random.normal(size=(classes, 16, width)) * spectrum / 2  # each class's own directions
    mix = np.linalg.qr(random.normal(size=(width, width)))[0]
    common = 0.6 * random.normal(size=width)  # image embeddings lie in a cone
    y = random.permutation(np.arange(rows + TEST_ROWS) % classes)
    x = np.empty((len(y), width), np.float32)
    for label in range(classes):
        (mine,) = np.nonzero(y == label)
        noise = random.normal(size=(len(mine), width)) * spectrum * sizes[label]
        noise += random.normal(size=(len(mine), 16)) @ own[label]
        x[mine] = (means[label] + noise + common) @ mix
    return x / np.linalg.norm(x, axis=1, keepdims=True), y


class FeatureDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """CLIP_benchmark's."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        self.features = features
        self.targets = targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[i], self.targets[i]


def clip_benchmark_fit(
    x: torch.Tensor, y: torch.Tensor, classes: int, decay: float
) -> torch.nn.Linear:
    """CLIP_benchmark's train() less its device check, autocast and messages."""
    torch.manual_seed(0)
    loader = DataLoader(FeatureDataset(x, y), batch_size=64, shuffle=True, num_workers=0)
    model = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=decay)
    criterion, epochs = torch.nn.CrossEntropyLoss(), 10
    for epoch in range(epochs):
        for i, (some, labels) in enumerate(loader):
            step = i + epoch * len(loader)
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (1 + np.cos(np.pi * step / (epochs * len(loader)))) * 0.1
            optimizer.zero_grad()
            loss = criterion(model(some), labels)
            loss.backward()
            optimizer.step()
    return model


def objectives(
    found: Found, parts: list[tuple[Array, Array]], grid: list[float]
) -> Iterator[float]:
    """scikit-learn's objective of each solution, in float64, divided by C times the rows."""
    owners = [part for part in parts for _ in grid]
    for (weight, bias, c), (x, y) in zip(found, owners, strict=True):
        log_p = log_softmax(x.astype(np.float64) @ weight.T + bias, axis=1)
        yield float(-log_p[np.arange(len(y)), y].mean() + (weight**2).sum() / (2 * c * len(y)))


def accuracies(found: Found, x: Array, y: Array) -> list[float]:
    """On the test rows."""
    return [float(((x @ weight.T + bias).argmax(1) == y).mean()) for weight, bias, _ in found]


@click.command()
@click.option("--rows", default=50_000, show_default=True, help="Training rows of each draw.")
@click.option("--width", default=512, show_default=True, help="Of the features.")
@click.option("--classes", default=100, show_default=True, help="Equally frequent.")
@click.option("--draws", default=1, show_default=True, help="Sets of rows, fitted together.")
@click.option("--points", default=10, show_default=True, help="Values of C, from 0.01 to 1e6.")
@click.option("--overlap", default=3.0, show_default=True, help="Spread of the means, divided.")
@click.option(
    "--peer", type=click.Choice(["sklearn", "clip_benchmark"]), default="sklearn", show_default=True
)
@click.option("--peer-threads", default=1, show_default=True, help="BLAS threads of scikit-learn.")
@click.option("--peer-tolerance", default=1e-4, show_default=True, help="scikit-learn's tol.")
@click.option("--tolerance", default=1e-7, show_default=True, help="fit_grid's.")
@click.option("--fits", default=FITS, show_default=True, help="CLIP_benchmark's that are run.")
@click.option("--threads", default=2, show_default=True, help="Of torch.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
@click.option("--seed", default=0, show_default=True, help="Of the features.")
def main(
    rows: int,
    width: int,
    classes: int,
    draws: int,
    points: int,
    overlap: float,
    peer: str,
    peer_threads: int,
    peer_tolerance: float,
    tolerance: float,
    fits: int,
    threads: int,
    rounds: int,
    seed: int,
) -> None:
    """Time a grid of probes on both sides, and compare what they find."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    grid = np.logspace(-2, 6, points).tolist()
    x, y = make(rows * draws, width, classes, overlap, seed)
    x_test, y_test = x[rows * draws :], y[rows * draws :]
    by_class = np.argsort(y[: rows * draws], kind="stable")  # each draw has as many of each class
    parts = [(x[by_class[d::draws]], y[by_class[d::draws]]) for d in range(draws)]
    tensors = [(torch.tensor(some), torch.tensor(labels)) for some, labels in parts]
    peak: dict[str, float] = {}

    def ours() -> Found:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fitted = fit_grids(tensors, classes, [grid] * draws, tolerance=tolerance)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak.setdefault("extra_mib", (after - before) / 1024)
        return [
            (weight.numpy(), bias.numpy(), c)
            for fit in fitted
            for weight, bias, c in zip(fit.weight, fit.bias, grid, strict=True)
        ]

    def sklearn() -> Found:
        found: Found = []
        with threadpool_limits(peer_threads):
            for some, labels in parts:
                for c in grid:
                    model = LogisticRegression(C=c, tol=peer_tolerance, max_iter=100_000)
                    model.fit(some.astype(np.float64), labels)
                    found.append((model.coef_, model.intercept_, c))
        return found

    def clip_benchmark() -> Found:
        decays = np.logspace(-6, 2, FITS).tolist()
        found: Found = []
        for decay in decays[:: FITS // fits][:fits]:
            model = clip_benchmark_fit(*tensors[0], classes, decay)
            weight, bias = model.weight.detach().double(), model.bias.detach().double()
            found.append((weight.numpy(), bias.numpy(), decay))
        return found

    def progress(text: str) -> None:
        click.echo(text, err=True)

    found: dict[str, Found] = {}
    sides = {"ours": ours, peer: sklearn if peer == "sklearn" else clip_benchmark}

    def kept(name: str) -> Callable[[], None]:
        return lambda: found.update({name: sides[name]()})

    timed = compare(
        {name: kept(name) for name in sides},
        rounds=rounds,
        warmup=0,
        work=len(grid) * draws,
        unit="probes",
        arguments=arguments,
    )
    # what is found is compared after it was timed: a side may take minutes
    our_found, their_found = found["ours"], found[peer]
    best, their_best = (max(accuracies(f, x_test, y_test)) for f in (our_found, their_found))
    progress(f"best test accuracy: ours {best:.4f}, {peer} {their_best:.4f}")
    if best < their_best - 0.001:
        raise click.ClickException(f"best test accuracy {best}, {peer}'s {their_best}")
    report: dict[str, Any] = {"best_test_acc1": {"ours": best, peer: their_best}}
    if peer == "sklearn":
        pairs = [
            {"c": c, "ours": mine, peer: other}
            for c, mine, other in zip(
                grid * draws,
                objectives(our_found, parts, grid),
                objectives(their_found, parts, grid),
                strict=True,
            )
        ]
        for pair in pairs[: len(grid)]:
            progress("C {c:.3g}: ours {ours:.10g}, scikit-learn {sklearn:.10g}".format(**pair))
        # two solutions that agree to the last digits are equal, not higher
        if higher := [pair for pair in pairs if pair["ours"] > pair[peer] * (1 + 1e-9)]:
            raise click.ClickException(f"our objective is higher: {higher}")
        report["objectives"] = pairs[: len(grid)]
    report |= timed
    if peer == "clip_benchmark" and fits < FITS:
        report["ratio"]["of"] += f" for {fits} of {FITS} fits"
        report["ratio_for_all_fits"] = report["ratio"]["median"] * FITS / fits
    click.echo(json.dumps(report | peak))


if __name__ == "__main__":
    main()
