"""The update and its schedule, beside open_clip's and torch's own."""

import math
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from clip_models import CLIP, ModelConfig, architecture
from clip_train import TrainConfig, TrainError
from clip_train.optimizers import decays, load_whole_state, make_optimizer, whole_state
from clip_train.step import MAX_LOGIT_SCALE, Stepper, learning_rate
from open_clip.loss import SigLipLoss
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr

TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg"},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 16},
}


def config(**changed: object) -> TrainConfig:
    values: dict[str, object] = {
        "model": "XS",
        "train_data": "d",
        "output": Path("run"),
        "samples_seen": 500,
        "batch_size": 10,
        "warmup": 7,
    }
    return TrainConfig(**(values | changed))  # pyright: ignore[reportArgumentType]


def make_stepper(
    model: CLIP, settings: TrainConfig, autocast: torch.dtype | None = None
) -> Stepper:
    optimizer = make_optimizer(model, settings)
    return Stepper(model, model, optimizer, settings, normalize=lambda x: x, autocast=autocast)


def test_schedule_is_open_clips() -> None:
    ours = config(lr=3e-4)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = cosine_lr(optimizer, 3e-4, 7, ours.steps)
    assert [learning_rate(s, 50, ours) for s in range(50)] == [theirs(s) for s in range(50)]


@pytest.mark.parametrize("cooldown", [0, 11])
def test_constant_schedule_is_open_clips(cooldown: int) -> None:
    ours = config(lr=3e-4, schedule="constant", cooldown=cooldown)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = (
        const_lr_cooldown(optimizer, 3e-4, 7, 50, cooldown)
        if cooldown
        else const_lr(optimizer, 3e-4, 7, 50)
    )
    found = [learning_rate(s, 50, ours) for s in range(50)]
    assert found == pytest.approx([theirs(s) for s in range(50)], rel=1e-12)


@pytest.mark.parametrize("values", ["XS", TIMM], ids=["vit", "timm"])
def test_weight_decay_groups_are_open_clips(values: object) -> None:
    model = CLIP(architecture("XS") if values == "XS" else ModelConfig.from_dict(TIMM))

    def excluded(n: str, p: torch.Tensor) -> bool:  # open_clip_train/main.py, 3.3.0
        return p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n

    for name, parameter in model.named_parameters():
        assert decays(name, parameter) != excluded(name, parameter), name
    groups = make_optimizer(model, config()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [len(p.shape) for p in groups[2]["params"]] == [0]  # the logit scale


def test_settings_of_the_new_run_hold() -> None:
    """--rebase may change them: only the state is taken up."""
    changed = {"weight_decay": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8}
    old, new = (make_optimizer(CLIP(architecture("XS")), config(**c)) for c in ({}, changed))
    load_whole_state(new, whole_state(old, main=True))
    assert [group["weight_decay"] for group in new.param_groups] == [0.01, 0.0, 0.0]
    assert all((g["betas"], g["eps"]) == ((0.8, 0.95), 1e-8) for g in new.param_groups)


@pytest.mark.parametrize("bias", [None, -10.0], ids=["clip", "siglip"])
def test_step_equals_plain_torch_and_open_clips_loss(bias: float | None) -> None:
    torch.manual_seed(0)
    model = replace(architecture("XS"), init_logit_bias=bias)
    ours, theirs = CLIP(model), CLIP(model)
    theirs.load_state_dict(ours.state_dict())
    settings = config(lr=1e-3, grad_clip=0.5, warmup=0)
    stepper = make_stepper(ours, settings)
    groups = [{**g, "fused": False} for g in make_optimizer(theirs, settings).param_groups]
    plain = torch.optim.AdamW(groups, fused=False, foreach=False)
    loss_of = open_clip.ClipLoss() if bias is None else SigLipLoss()
    for step in range(5):
        images = torch.randn(6, 3, 64, 64)
        tokens = open_clip.tokenize([f"number {step} {i}" for i in range(6)])
        lr = learning_rate(step, settings.steps, settings)
        update = stepper.step(images, tokens, lr=lr, seed=0)
        loss = loss_of(*theirs(images, tokens))
        plain.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        torch.testing.assert_close(update.loss, loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(update.grad_norm, norm, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in ours.parameters())


def test_logit_scale_stays_in_range() -> None:
    model = CLIP(architecture("XS"))
    stepper = make_stepper(model, config(), torch.bfloat16)
    images, tokens = torch.randn(4, 3, 64, 64), open_clip.tokenize(list("abcd"))
    for start, end in ((9.0, MAX_LOGIT_SCALE), (-1.0, 0.0)):
        model.logit_scale.data.fill_(start)
        stepper.step(images, tokens, lr=1e-9, seed=0)
        assert model.logit_scale.item() == pytest.approx(end)
    assert model.logit_scale.dtype == torch.float32
    assert math.exp(MAX_LOGIT_SCALE) == pytest.approx(100)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"lr": 0.0}, "--lr is 0.0; it must be more than 0"),
        ({"beta2": 1.0}, "--beta2 is 1.0; it must be at least 0 and below 1"),
        ({"warmup": 50}, "--warmup is 50; it must be fewer than all of the run's 50 steps"),
        ({"shuffle_shards": 65}, "at most 64"),
    ],
)
def test_config_refuses(changed: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        config(**changed)


def test_steps_round_up() -> None:
    assert config(samples_seen=501).steps == 51
