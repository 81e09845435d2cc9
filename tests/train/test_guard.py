"""Skipped steps, fp16's loss scale, and the running mean of weights."""

import math

import numpy as np
import open_clip
import pytest
import torch
from clip_models import CLIP, architecture
from clip_train.ema import Ema
from clip_train.guard import Guard
from clip_train.optimizers import make_optimizer
from clip_train.step import Stepper, Update

from .test_step import config

CPU = torch.device("cpu")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, 64, 64, generator=generator)
    return images, open_clip.tokenize([f"number {step} {i}" for i in range(6)])


def stepper_of(model: CLIP, autocast: torch.dtype | None = None, **changed: object) -> Stepper:
    settings = config(warmup=0, **changed)
    optimizer = make_optimizer(model, settings)
    return Stepper(model, model, optimizer, settings, normalize=lambda x: x, autocast=autocast)


def take(stepper: Stepper, step: int, *, poison: bool = False) -> Update:
    images, tokens = batch(step)
    if poison:
        images[0, 0, 0, 0] = math.inf
    return stepper.step(images, tokens, lr=1e-3, seed=step)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_a_poisoned_step_changes_nothing(optimizer: str, micro_batch_size: int) -> None:
    """Weights and optimizer state end as if the step had not been."""
    torch.manual_seed(0)
    model = CLIP(architecture("XS")).train()
    untouched = CLIP(architecture("XS")).train()
    untouched.load_state_dict(model.state_dict())
    options = {"optimizer": optimizer, "grad_clip": 1.0, "micro_batch_size": micro_batch_size}
    one, other = stepper_of(model, **options), stepper_of(untouched, **options)
    for step in range(4):
        if step == 2:
            update = take(one, 9, poison=True)
            assert update.skipped
            assert not update.grad_norm.isfinite()
        assert not take(one, step).skipped
        take(other, step)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, untouched.state_dict()[name]), name
    assert str(one.optimizer.state_dict()) == str(other.optimizer.state_dict())


def test_spikes_are_judged_by_the_mean_of_what_was_taken() -> None:
    guard = Guard(CPU, spike_factor=3.0, fp16=False)
    drawn = np.random.default_rng(0).uniform(0.8, 1.2, 150)
    assert not any(guard.judge(torch.tensor(norm)).item() for norm in drawn)
    expected = drawn[0]
    for number, norm in enumerate(drawn[1:], 2):
        expected += (norm - expected) / min(number, 100)
    assert guard.state_dict()["mean"].item() == pytest.approx(expected, rel=1e-5)
    for norm, skip in ((3.5, True), (2.5, False), (math.nan, True), (3.5, True), (1.0, False)):
        assert guard.judge(torch.tensor(norm)).item() == skip
    again = Guard(CPU, spike_factor=3.0, fp16=False)
    again.load_state_dict(guard.state_dict())
    for norm in (2.9, 3.5, 1.0):
        assert torch.equal(again.judge(torch.tensor(norm)), guard.judge(torch.tensor(norm)))
    assert again.state_dict() == guard.state_dict()


def test_no_spike_among_the_first() -> None:
    guard = Guard(CPU, spike_factor=2.0, fp16=False)
    norms = [1.0] * 50 + [50.0] + [1.0] * 49
    assert not any(guard.judge(torch.tensor(norm)).item() for norm in norms)
    assert guard.judge(torch.tensor(50.0)).item()


def test_loss_scale_is_grad_scalers() -> None:
    """Halved by an overflow, doubled after 2,000 steps without one."""
    guard = Guard(CPU, spike_factor=0.0, fp16=True)
    scaler = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(4500):
        overflow = step in (3, 4, 2100)
        scaler.scale((weight * (math.inf if overflow else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = guard.judge(torch.tensor(math.inf if overflow else 1.0))
        assert skipped.item() == overflow
        assert guard.scale.item() == scaler.get_scale(), step


@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_fp16_steps_are_close_to_fp32(micro_batch_size: int) -> None:
    """The scale is taken out of gradient and norm; where it is too large the step is skipped."""
    torch.manual_seed(0)
    model = CLIP(architecture("XS")).train()
    exact = CLIP(architecture("XS")).train()
    exact.load_state_dict(model.state_dict())
    half = stepper_of(model, torch.float16, micro_batch_size=micro_batch_size)
    full = stepper_of(exact)
    half.guard.scale = torch.tensor(2.0**40)
    while take(half, 0).skipped:
        pass
    assert 1 < half.guard.scale < 2.0**40
    take(full, 0)
    for step in range(1, 4):
        update, expected = take(half, step), take(full, step)
        torch.testing.assert_close(update.loss, expected.loss, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(update.grad_norm, expected.grad_norm, rtol=5e-2, atol=1e-3)


def test_ema_is_the_sum_written_out() -> None:
    torch.manual_seed(0)
    model = CLIP(architecture("XS")).double()
    ema = Ema(model, decay=0.9)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    for step in range(1, 30):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, mean in ema.whole_state().items():
        torch.testing.assert_close(mean, expected[name], rtol=1e-12, atol=1e-12)
    again = Ema(CLIP(architecture("XS")).double(), decay=0.9)
    again.load_whole_state(ema.whole_state())
    found, given = again.whole_state(), ema.whole_state()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_ema_copies_counters() -> None:
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    model(torch.randn(8, 2))
    ema.update(100)
    found = ema.whole_state()
    assert found["num_batches_tracked"] == 1
    start = torch.zeros(2)
    torch.testing.assert_close(found["running_mean"], (start + model.running_mean) / 2)
