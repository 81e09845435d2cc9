"""Training against plain loops of the published procedures, in open_clip's towers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_finetune import FinetuneError, TrainConfig, open_set, train
from clip_finetune.batches import Batch, TrainBatches
from clip_models import ModelError, build_head, list_heads, load_head, load_model, save_head
from open_clip.loss import ClipLoss
from torch import nn

from .conftest import config, digits, equal, metrics, weights, write_set


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
        assert torch.equal(head.bias, old.bias)
        assert (head.kind, head.templates_hash) == ("zero-shot", old.templates_hash)
        assert head.fingerprint == result["fingerprint"]
    rows = metrics(out)
    assert [row["task"] for row in rows[:3]] == ["digits", "inverted", "digits"]
    assert np.mean([row["loss"] for row in rows[-8:]]) < 0.9 * rows[0]["loss"]
    provenance = load_model(out).provenance
    assert provenance["base"] == load_model(base).fingerprint
    assert provenance["samples_seen"] == 60 * 16
    assert provenance["tasks"][1]["name"] == "inverted"
    assert not out.with_name("out.state").exists()


STEPS, WARMUP, LR = 50, 10, 1e-4


class Plain:
    """The published loops' common part: one AdamW over all that learns, WiSE-FT's schedule."""

    def __init__(self, base: Path, sets: list[Path], learning: Any, clip: float | None = 1.0):
        self.loaded = load_model(base)
        data = [open_set(path, "train") for path in sets]
        self.batches = TrainBatches(data, self.loaded.preprocess.train, batch_size=16, seed=0)
        self.parameters, self.clip = [p for p in learning if p.requires_grad], clip
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.1, foreach=False)
        means = self.loaded.preprocess.config
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (means.mean, means.std))

    def images(self, batch: Batch) -> torch.Tensor:
        return (batch.images / 255 - self.mean) / self.std

    def step(self, step: int, loss: torch.Tensor) -> float:
        done = (step - WARMUP) / (STEPS - WARMUP)
        share = (step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        self.optimizer.param_groups[0]["lr"] = LR * share
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss.item()


def assert_same_weights(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float
):
    for name, weight in theirs.items():
        mine = ours[name]
        if name.endswith("in_proj_bias"):
            # attention does not change with the key bias: its gradient is rounding noise, which
            # Adam scales up to the learning rate
            third = len(mine) // 3
            mine, weight = (torch.cat([w[:third], w[2 * third :]]) for w in (mine, weight))
        torch.testing.assert_close(mine, weight, atol=atol, rtol=0)


@pytest.mark.parametrize("method", ["frozen-head", "end-to-end"])
def test_equals_the_published_loop(
    base: Path, digits_set: Path, inverted_set: Path, tmp_path: Path, method: str
):
    """PAINT's joint loop, WiSE-FT's end-to-end loop: 50 steps, all weights within 1e-6."""
    sets = [digits_set, inverted_set] if method == "frozen-head" else [digits_set]
    options = {"iterations": STEPS, "warmup": WARMUP, "lr": LR, "method": method}
    train(base, tmp_path / "out", config(*sets, **options))

    visual = open_clip.create_model(f"local-dir:{base}").visual.train()
    heads: list[nn.Linear] = []
    for path in sets:
        data = open_set(path, "train")
        made = build_head(load_model(base), data.class_names, data.templates)
        head = nn.Linear(made.weight.shape[1], len(made.bias))
        head.load_state_dict({"weight": made.weight, "bias": made.bias})
        heads.append(head.requires_grad_(method == "end-to-end"))
    loop = Plain(base, sets, [*visual.parameters(), *nn.ModuleList(heads).parameters()])
    losses: list[float] = []
    for step in range(STEPS):
        batch = loop.batches[step]
        features = visual(loop.images(batch))
        features = features / features.norm(dim=-1, keepdim=True)
        loss = F.cross_entropy(heads[step % len(sets)](features), batch.labels)
        losses.append(loop.step(step, loss))

    found = [row["loss"] for row in metrics(tmp_path / "out")]
    assert np.allclose(found, losses, atol=1e-6, rtol=0)
    theirs = {f"visual.{name}": weight for name, weight in visual.state_dict().items()}
    assert_same_weights(weights(tmp_path / "out"), theirs, atol=1e-6)
    for path, head in zip(sets, heads, strict=True):
        mine = load_head(tmp_path / "out", path.name)
        assert mine.kind == ("zero-shot" if method == "frozen-head" else "fine-tuned")
        torch.testing.assert_close(mine.weight, head.weight.data, atol=2e-6, rtol=0)  # of size 14
        torch.testing.assert_close(mine.bias, head.bias.data, atol=1e-6, rtol=0)


def test_flyp_equals_its_loop(base: Path, digits_set: Path, tmp_path: Path):
    """Both towers of open_clip under its ClipLoss, on prompts drawn for each image."""
    options = {"iterations": STEPS, "warmup": WARMUP, "lr": LR, "grad_clip": 0.0}
    train(base, tmp_path / "out", config(digits_set, method="flyp", **options))

    model = open_clip.create_model(f"local-dir:{base}").train()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{base}")
    data = open_set(digits_set, "train")
    loop, loss_of = Plain(base, [digits_set], model.parameters(), clip=None), ClipLoss()
    losses: list[float] = []
    used = set()
    for step in range(STEPS):
        batch = loop.batches[step]
        drawn = (batch.draws % 2).tolist()
        used |= set(drawn)
        prompts = [
            data.templates[t].replace("{c}", data.class_names[y])
            for t, y in zip(drawn, batch.labels.tolist(), strict=True)
        ]
        loss = loss_of(*model(loop.images(batch), tokenizer(prompts)))
        losses.append(loop.step(step, loss))
    assert used == {0, 1}
    found = [row["loss"] for row in metrics(tmp_path / "out")]
    assert np.allclose(found, losses, atol=1e-5, rtol=0)
    loaded = load_model(tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert_same_weights(theirs.state_dict(), model.state_dict(), atol=1e-5)
    head = load_head(tmp_path / "out", "digits")
    new = build_head(loaded, data.class_names, data.templates)
    assert torch.equal(head.weight, new.weight)
    assert not torch.equal(
        head.weight, build_head(load_model(base), data.class_names, data.templates).weight
    )


def test_bf16(base: Path, digits_set: Path, tmp_path: Path):
    train(base, tmp_path / "fp32", config(digits_set))
    train(base, tmp_path / "bf16", config(digits_set, precision="bf16"))
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert not equal(tmp_path / "fp32", tmp_path / "bf16")
    assert {weight.dtype for weight in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_batch_norm_statistics_stay(resnet: Path, digits_set: Path, tmp_path: Path):
    train(resnet, tmp_path / "out", config(digits_set))
    before, after = weights(resnet), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {
        name for name in before if name.startswith("visual.") and not name.endswith(statistics)
    }


@pytest.fixture
def probed(own_base: Path, digits_set: Path) -> Path:
    """A base model with a probe's head for the digits, and one on other features."""
    data = open_set(digits_set, "train")
    head = build_head(load_model(own_base), data.class_names, data.templates)
    probe = replace(head, weight=head.weight + 0.5, kind="probe", templates_hash=None)
    save_head(own_base, "probed", probe)
    save_head(own_base, "pre", replace(probe, feature="pre"))
    names = (*probe.class_names[:9], "none")
    save_head(own_base, "other", replace(probe, class_names=names))
    return own_base


def test_saved_head(probed: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    out = tmp_path / "out"
    train(probed, out, config(digits_set, inverted_set, head=("probed", "probed")))
    probe, new = load_head(probed, "probed"), load_head(out, "digits")
    assert torch.equal(new.weight, probe.weight)
    assert new.kind == "fine-tuned"
    # the other set has the same classes in another order: rows follow the names
    assert torch.equal(load_head(out, "inverted").weight, probe.weight.flip(0))

    with pytest.raises(FinetuneError, match=r"'other' for .*: 1 of 10 classes .* 'nine'"):
        train(probed, tmp_path / "o", config(digits_set, head=("other",)))
    with pytest.raises(FinetuneError, match="1 --head for 2 --task"):
        config(digits_set, inverted_set, head=("probed",))
    with pytest.raises(ModelError, match="missing"):
        train(probed, tmp_path / "o", config(digits_set, head=("missing",)))
    with pytest.raises(FinetuneError, match="before the projection"):
        train(probed, tmp_path / "o", config(digits_set, head=("pre",)))
    assert not (tmp_path / "o").exists()


def test_lp_ft_trains_the_probe(probed: Path, digits_set: Path, tmp_path: Path):
    train(probed, tmp_path / "out", config(digits_set, method="lp-ft", head=("probed",)))
    probe, new = load_head(probed, "probed"), load_head(tmp_path / "out", "digits")
    assert 0 < (new.weight - probe.weight).abs().max() < 0.1  # it began from the probe
    assert new.kind == "fine-tuned"
    with pytest.raises(FinetuneError, match="no --head is given"):
        config(digits_set, method="lp-ft")
    with pytest.raises(FinetuneError, match="takes no --head"):
        config(digits_set, method="flyp", head=("probed",))


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
    none = write_set(tmp_path / "none", {"train": [bad] * 30})
    with pytest.raises(FinetuneError, match="30 of 30 images cannot be decoded"):
        train(base, tmp_path / "o", config(none))
    assert not (tmp_path / "o").exists()


def test_names_that_cannot_be_are_refused_first(base: Path, digits_set: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for out in (Path("."), tmp_path / "link"):
        with pytest.raises(FinetuneError, match=f"{out} cannot become a new folder"):
            train(base, out, config(digits_set))
    dotted = write_set(tmp_path / ".dot", {"train": digits(0, 20)})
    with pytest.raises(FinetuneError, match=r"'\.dot' cannot; rename the folder"):
        train(base, tmp_path / "out", config(dotted))
    assert not (tmp_path / "out.state").exists()


def test_two_tasks_of_one_name(base: Path, digits_set: Path, tmp_path: Path):
    with pytest.raises(FinetuneError, match="both named 'digits'"):
        train(base, tmp_path / "out", config(digits_set, digits_set))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": math.inf}, "--lr is inf"),
        ({"epochs": math.inf}, "--epochs is inf; expected 0 or more, and finite"),
        ({"warmup": math.inf}, "--warmup is inf; expected 0 or more, and finite"),
        ({"batch_size": 0}, "--batch-size is 0; expected 1 or more"),
        ({"warmup": 2.5}, "--warmup is 2.5; expected whole steps, or a share"),
        ({"ema": 1.0}, "--ema is 1.0; expected at least 0 and below 1"),
        ({"layer_decay": 0.0}, "--layer-decay is 0.0"),
        ({"random_erasing": 1.1}, "--random-erasing is 1.1; expected from 0 to 1"),
    ],
)
def test_senseless_settings(changes: dict[str, float], message: str):
    with pytest.raises(FinetuneError, match=message):
        config(Path("x"), **changes)
    with pytest.raises(FinetuneError, match="no --task"):
        TrainConfig(task=())


def test_schedule_by_epochs_and_shares():
    assert config(Path("x"), epochs=10, batch_size=512, warmup=500).schedule(1_281_167) == (
        25023,
        500,
    )
    assert config(Path("x"), epochs=50, batch_size=64, warmup=0.2).schedule(1000) == (782, 156)
    assert config(Path("x"), iterations=12, warmup=0).schedule(1) == (12, 0)
    with pytest.raises(FinetuneError, match="--warmup 500 leaves nothing of --epochs 10, 157"):
        config(Path("x"), epochs=10, batch_size=64, warmup=500).schedule(1000)


def test_metrics_are_json(base: Path, digits_set: Path, tmp_path: Path):
    train(base, tmp_path / "out", config(digits_set, iterations=3, warmup=1))
    lines = (tmp_path / "out/training/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {
        *("step", "task", "loss", "accuracy", "lr", "grad_norm", "images_per_second")
    }
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
