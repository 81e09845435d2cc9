"""Training against a plain loop, and everything that may interrupt it."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_finetune import FinetuneError, TrainConfig, open_set, train
from clip_finetune.batches import TrainBatches
from clip_finetune.state import TrainState
from clip_models import ModelError, build_head, list_heads, load_head, load_model, save_head

from .conftest import digits, equal, weights, write_set


def config(*tasks: Path, **changes: object) -> TrainConfig:
    settings = {"iterations": 12, "batch_size": 16, "lr": 1e-3, "warmup": 2, "workers": 0}
    return TrainConfig(task=tasks, **(settings | changes))


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]


def test_only_the_image_tower_learns(base: Path, digits_set: Path, inverted_set: Path, tmp_path):
    out = tmp_path / "out"
    result = train(base, out, config(digits_set, inverted_set, iterations=60))
    before, after = weights(base), weights(out)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("visual."), name
    assert list_heads(out) == ["digits", "inverted"]
    for data in (digits_set, inverted_set):
        names, templates = (open_set(data, "train").class_names, open_set(data, "train").templates)
        head, new = load_head(out, data.name), build_head(load_model(out), names, templates)
        old = build_head(load_model(base), names, templates)
        assert torch.equal(head.weight, old.weight)
        assert torch.equal(head.weight, new.weight)
        assert head.kind == "zero-shot"
        assert head.fingerprint == result["fingerprint"]
    rows = metrics(out)
    assert [row["task"] for row in rows[:3]] == ["digits", "inverted", "digits"]
    assert np.mean([row["loss"] for row in rows[-8:]]) < 0.9 * rows[0]["loss"]
    provenance = load_model(out).provenance
    assert provenance["base"] == load_model(base).fingerprint
    assert provenance["samples_seen"] == 60 * 16
    assert provenance["tasks"][1]["name"] == "inverted"
    assert not out.with_name("out.state").exists()


def test_equals_a_plain_loop(base: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    """The published procedure, in the shortest words: 50 steps, all weights within 1e-6."""
    steps, warmup, lr = 50, 10, 1e-4
    settings = config(digits_set, inverted_set, iterations=steps, warmup=warmup, lr=lr)
    train(base, tmp_path / "out", settings)

    loaded = load_model(base)
    sets = [open_set(path, "train") for path in (digits_set, inverted_set)]
    batches = TrainBatches(sets, loaded.preprocess, batch_size=16, seed=0)
    heads = [build_head(loaded, data.class_names, data.templates) for data in sets]
    visual = loaded.model.visual.train()
    groups = [
        {"params": [p for p in visual.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in visual.parameters() if p.ndim < 2], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup
            if s < warmup
            else 0.5 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
        ),
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.preprocess.config.mean,
                                                         loaded.preprocess.config.std))  # fmt: skip
    losses: list[float] = []
    for step in range(steps):
        _, images, labels, _ = batches[step]
        head = heads[step % 2]
        features = visual((images / 255 - mean) / std)
        features = features / features.norm(dim=-1, keepdim=True)
        loss = F.cross_entropy(features @ head.weight.T + head.bias, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    assert np.allclose(
        [row["loss"] for row in metrics(tmp_path / "out")], losses, atol=1e-6, rtol=0
    )
    ours = weights(tmp_path / "out")
    for name, weight in visual.state_dict().items():
        mine = ours[f"visual.{name}"]
        if name.endswith("in_proj_bias"):
            # attention does not change with the key bias: its gradient is rounding noise, which
            # Adam scales up to the learning rate
            mine, weight = (torch.cat([w[:32], w[64:]]) for w in (mine, weight))
        torch.testing.assert_close(mine, weight, atol=1e-6, rtol=0)


def test_sigterm_then_continued(base: Path, digits_set: Path, tmp_path: Path, monkeypatch):
    settings = config(digits_set, workers=1)
    train(base, tmp_path / "whole", settings)
    log = TrainState.log

    def log_then_sigterm(self: TrainState, row: dict[str, float]) -> None:
        log(self, row)
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainState, "log", log_then_sigterm)
    before = signal.getsignal(signal.SIGTERM)
    result = train(base, tmp_path / "out", settings)
    assert result["status"] == "stopped"
    assert 7 <= result["step"] <= 8
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert train(base, tmp_path / "out", settings)["status"] == "trained"
    assert equal(tmp_path / "out", tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("killed_at", [4, 9, 12])
def test_killed_then_continued(base: Path, digits_set: Path, tmp_path, monkeypatch, killed_at: int):
    settings = config(digits_set, save_every=5)
    train(base, tmp_path / "whole", settings)
    log = TrainState.log

    def die(self: TrainState, row: dict[str, float]) -> None:
        log(self, row)
        if row["step"] == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "log", die)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "out", settings)
    monkeypatch.undo()
    train(base, tmp_path / "out", settings)
    assert equal(tmp_path / "out", tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


def test_bf16(base: Path, digits_set: Path, tmp_path: Path):
    train(base, tmp_path / "fp32", config(digits_set))
    train(base, tmp_path / "bf16", config(digits_set, precision="bf16"))
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert not equal(tmp_path / "fp32", tmp_path / "bf16")
    assert {weight.dtype for weight in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_run_again(base: Path, digits_set: Path, tmp_path: Path):
    out = tmp_path / "out"
    first = train(base, out, config(digits_set))
    again = train(base, out, config(digits_set, workers=1, save_every=3))
    assert again["status"] == "nothing left to do"
    assert again["fingerprint"] == first["fingerprint"]
    with pytest.raises(
        FinetuneError, match=r"another run's \(arguments.lr is 0.001 there, 0.002 here"
    ):
        train(base, out, config(digits_set, lr=2e-3))
    with pytest.raises(FinetuneError, match="exists and is another run's"):
        train(base, base, config(digits_set))


def test_the_state_of_another_run_is_refused(base: Path, digits_set: Path, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_finetune.loop.Trainer.publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "out", config(digits_set, save_every=5))
    with pytest.raises(FinetuneError, match=r"another run's \(arguments.seed is 0 there, 1 here"):
        train(base, tmp_path / "out", config(digits_set, seed=1))


def test_batch_norm_statistics_stay(resnet: Path, digits_set: Path, tmp_path: Path):
    train(resnet, tmp_path / "out", config(digits_set))
    before, after = weights(resnet), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {
        name for name in before if name.startswith("visual.") and not name.endswith(statistics)
    }


def test_saved_head(own_base: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    loaded = load_model(own_base)
    data = open_set(digits_set, "train")
    head = build_head(loaded, data.class_names, data.templates)
    probe = replace(head, weight=head.weight + 0.5, kind="probe", templates_hash=None)
    save_head(own_base, "probed", probe)
    train(own_base, tmp_path / "out", config(digits_set, head=("probed",)))
    new = load_head(tmp_path / "out", "digits")
    assert torch.equal(new.weight, probe.weight)
    assert new.kind == "fine-tuned"

    with pytest.raises(FinetuneError, match=r"calls class 0 'zero', .* calls it 'nine'"):
        train(own_base, tmp_path / "o", config(inverted_set, head=("probed",)))
    with pytest.raises(FinetuneError, match="1 --head for 2 --task"):
        config(digits_set, inverted_set, head=("probed",))
    with pytest.raises(ModelError, match="missing"):
        train(own_base, tmp_path / "o", config(digits_set, head=("missing",)))
    save_head(own_base, "pre", replace(probe, feature="pre"))
    with pytest.raises(FinetuneError, match="before the projection"):
        train(own_base, tmp_path / "o", config(digits_set, head=("pre",)))
    assert not (tmp_path / "o").exists()


def test_head_of_another_model(own_base: Path, finetuned: Path, digits_set: Path, tmp_path: Path):
    data = open_set(digits_set, "train")
    head = build_head(load_model(finetuned), data.class_names, data.templates)
    save_head(finetuned, "theirs", head)
    (own_base / "heads").mkdir()
    (own_base / "heads/theirs.safetensors").write_bytes(
        (finetuned / "heads/theirs.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match="theirs"):
        train(own_base, tmp_path / "out", config(digits_set, head=("theirs",)))
    (finetuned / "heads/theirs.safetensors").unlink()


def test_nan_stops_and_writes_nothing(base: Path, digits_set: Path, tmp_path: Path):
    with pytest.raises(FinetuneError, match=r"loss is nan at step \d, task 'digits'"):
        train(base, tmp_path / "out", config(digits_set, lr=1e30, warmup=0, grad_clip=0))
    assert not (tmp_path / "out").exists()
    train(base, tmp_path / "out", config(digits_set))  # a lower rate needs no cleaning up


def test_corrupt_images(base: Path, tmp_path: Path):
    good, bad = digits(0, 60), (b"not an image", 5)
    few = write_set(tmp_path / "few", {"train": [*good, bad]})
    result = train(base, tmp_path / "out", config(few, iterations=4, batch_size=61))
    assert result["corrupt"] == 4
    many = write_set(tmp_path / "many", {"train": [*good, *[bad] * 6]})
    with pytest.raises(FinetuneError, match="6 of 66 images cannot be decoded, more than 5%"):
        train(base, tmp_path / "o", config(many, batch_size=66))
    assert not (tmp_path / "o").exists()


def test_two_tasks_of_one_name(base: Path, digits_set: Path, tmp_path: Path):
    with pytest.raises(FinetuneError, match="both named 'digits'"):
        train(base, tmp_path / "out", config(digits_set, digits_set))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 12}, "--warmup 12 leaves nothing of --iterations 12"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"batch_size": 0}, "--batch-size is 0; expected 1 or more"),
    ],
)
def test_senseless_settings(changes: dict[str, float], message: str):
    with pytest.raises(FinetuneError, match=message):
        config(Path("x"), **changes)
