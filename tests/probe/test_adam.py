"""The batched AdamW is, setting by setting, a plain loop; the paper's protocol is reproduced."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_probe.adam import AdamSetting, epoch_order, fit_adam
from clip_probe.draws import Rows, Task
from clip_probe.probes import EPOCHS, RATES, find_probes, method_of
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Sampler, TensorDataset


def digits() -> tuple[Rows, Rows]:
    data = load_digits()
    x = F.normalize(torch.tensor(data.data, dtype=torch.float32))
    y = torch.tensor(data.target)
    return Rows(x[:600], y[:600]), Rows(x[600:], y[600:])


class InOrder(Sampler[int]):
    """The documented order, an epoch after another."""

    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self.samples, 0, self.epoch).tolist()
        self.epoch += 1

    def __len__(self) -> int:
        return self.samples


def reference(
    rows: Rows, setting: AdamSetting, start: tuple[torch.Tensor, torch.Tensor]
) -> torch.nn.Linear:
    """CLIP_benchmark's train() on a CPU, and a start of the caller's."""
    model = torch.nn.Linear(rows.features.shape[1], len(start[1]))
    with torch.no_grad():
        model.weight.copy_(start[0])
        model.bias.copy_(start[1])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, weight_decay=setting.weight_decay
    )
    sampler = InOrder(len(rows.labels))
    loader = DataLoader(TensorDataset(*rows), batch_size=256, sampler=sampler)
    total = setting.epochs * len(loader)
    for epoch in range(setting.epochs):
        for i, (x, y) in enumerate(loader):
            step = i + epoch * len(loader)
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (1 + np.cos(np.pi * step / total)) * setting.lr
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def test_each_setting_equals_a_loop_of_its_own() -> None:
    train, test = digits()
    start = torch.randn(10, 64) / 8, torch.randn(10) / 8
    grid = [AdamSetting(0.1, 2), AdamSetting(0.01, 5, 0.1), AdamSetting(0.001, 3, 1.0)]
    weight_GCD, bias_GC = fit_adam(train.features, train.labels, 10, grid, start=start)
    for setting, weight_CD, bias_C in zip(grid, weight_GCD, bias_GC, strict=True):
        model = reference(train, setting, start)
        assert torch.allclose(weight_CD, model.weight, atol=1e-4)
        assert torch.allclose(bias_C, model.bias, atol=1e-4)
        ours = F.linear(test.features, weight_CD, bias_C).argmax(1)
        assert torch.equal(ours, model(test.features).argmax(1))


def test_the_start_is_that_of_a_linear_layer_and_of_the_seed() -> None:
    train, _ = digits()
    nothing = [AdamSetting(0.0, 1)]  # a learning rate of nothing leaves the start
    weight_1CD, bias_1C = fit_adam(train.features, train.labels, 10, nothing, seed=3)
    assert weight_1CD.abs().max() <= 1 / math.sqrt(64)
    assert weight_1CD.std() == pytest.approx(1 / math.sqrt(64 * 3), rel=0.1)
    assert bias_1C.abs().max() <= 1 / math.sqrt(64)
    again, _ = fit_adam(train.features, train.labels, 10, nothing, seed=3)
    assert torch.equal(again, weight_1CD)
    assert not torch.equal(fit_adam(train.features, train.labels, 10, nothing, seed=4)[0], again)


def test_an_epoch_has_every_row_once_in_its_own_order() -> None:
    orders = [epoch_order(100, 0, epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_the_papers_protocol_equals_a_reference_to_a_tenth_of_a_point() -> None:
    """Adam, batch 256, nine settings one after another, the best on test."""
    train, test = digits()
    (probe,) = find_probes([Task([(train, test)], train)], 10, method_of("adam", paper=True))
    start = fit_adam(train.features, train.labels, 10, [AdamSetting(0.0, 1)])
    accuracies: list[float] = []
    for lr in RATES:
        for epochs in EPOCHS:
            model = reference(train, AdamSetting(lr, epochs), (start[0][0], start[1][0]))
            predicted = model(test.features).argmax(1)
            accuracies.append((predicted == test.labels).double().mean().item())
    assert probe.judged is not None
    assert np.abs(np.array(probe.judged) - accuracies).max() <= 0.001
    assert max(probe.judged) == pytest.approx(max(accuracies), abs=0.001)
    found = (probe.logits(test.features).argmax(1) == test.labels).double().mean().item()
    assert found == max(probe.judged)


def test_a_start_belongs_to_the_classes_that_are_there() -> None:
    """Class 4 has no image: its row of the start is left out, and it is never predicted."""
    train, test = digits()
    train = train.pick(train.labels != 4)
    start = torch.zeros(10, 64), torch.zeros(10)
    start[1][5] = 1e4  # no training moves class 5 from first place
    method = method_of("adam", start=start)._replace(settings=[AdamSetting(0.001, 1)])
    (probe,) = find_probes([Task([(train, test)], train)], 10, method)
    assert (probe.logits(test.features).argmax(1) == 5).all()
    assert probe.logits(test.features).isfinite().all()
