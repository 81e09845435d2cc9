"""A run beside open_clip's own trainer: same weights, same batches in the same order.

Towers with layer norm, for float32 is not enough for those with batch norm: it magnifies rounding,
and the trainers of the quickstart's ResNet part by 1e-3 in 10 steps; in float64, by 4e-15.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip_train.main
import open_clip_train.train
import pytest
import torch
from clip_models import CLIP, Preprocess, architecture, save_model
from clip_train import TrainConfig, metrics, train
from clip_train.loader import Batch, Batches
from torch import Tensor

STEPS, BATCH = 100, 16
MODELS = {
    "clip": architecture("XS"),
    "siglip": replace(architecture("XS"), init_logit_scale=math.log(10), init_logit_bias=-10.0),
}


@dataclass
class InMemory:
    """What open_clip's trainer needs of a data loader."""

    batches: list[tuple[Tensor, Tensor]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    @property
    def num_samples(self) -> int:
        return sum(len(images) for images, _ in self.batches)


def our_run(
    model: Path, data: Path, output: Path, patch: pytest.MonkeyPatch
) -> tuple[list[float], list[Batch]]:
    """The loss of every step of a run of ours, and the batches it took, in order."""
    taken: list[Batch] = []
    make = Batches.__getitem__

    def watched(self: Batches, step: int) -> Batch:
        taken.append(make(self, step))
        return taken[-1]

    patch.setattr(Batches, "__getitem__", watched)
    patch.setenv("ACCELERATE_USE_CPU", "true")
    train(
        TrainConfig(
            model=str(model), train_data=str(data), output=output, samples_seen=STEPS * BATCH,
            batch_size=BATCH, warmup=10, lr=5e-4, grad_clip=1.0, workers=0, log_every=1,
            save_every=STEPS, precision="fp32",
        )
    )  # fmt: skip
    return [row["loss"] for row in metrics.read_rows(output)], taken


def their_run(
    model: Path,
    batches: list[tuple[Tensor, Tensor]],
    logs: Path,
    flags: list[str],
    patch: pytest.MonkeyPatch,
) -> list[float]:
    """The loss of every step of open_clip_train.main, its data exchanged for `batches`."""
    losses: list[float] = []
    backward = open_clip_train.train.backward

    def watched(total_loss: Tensor, scaler: Any) -> None:
        losses.append(total_loss.item())
        backward(total_loss, scaler)

    fed = SimpleNamespace(dataloader=InMemory(batches), set_epoch=lambda epoch: None)
    patch.setattr(open_clip_train.train, "backward", watched)
    patch.setattr(open_clip_train.main, "get_data", lambda *_, **__: {"train": fed})
    patch.setattr(open_clip_train.main, "setup_logging", lambda *_: None)
    arguments = (
        f"--model local-dir:{model} --train-data fed --device cpu --precision fp32 --epochs 1 "
        f"--batch-size {BATCH} --lr 5e-4 --beta1 0.9 --beta2 0.98 --eps 1e-6 --wd 0.2 --warmup 10 "
        f"--grad-clip-norm 1 --log-every-n-steps {STEPS} --logs {logs} --name run"
    )
    assert open_clip_train.main.main(arguments.split() + flags) is None
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_open_clips_trainer(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its main.py whole: optimizer, schedule, loss, step, clipping and clamp are its own."""
    torch.manual_seed(0)
    preprocess = Preprocess(64)
    save_model(tmp_path / "model", CLIP(MODELS[name]), preprocess)
    ours, taken = our_run(tmp_path / "model", data, tmp_path / "ours", monkeypatch)
    batches = [(preprocess.normalize(b.images_b3SS), b.tokens_bL) for b in taken]
    flags = ["--siglip"] if name == "siglip" else []
    theirs = their_run(tmp_path / "model", batches, tmp_path / "theirs", flags, monkeypatch)
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1] < ours[0] - 0.5  # it did learn
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"{name}: loss {ours[0]:.4f} to {ours[-1]:.4f}; largest gap {max(gaps):.1e}")
    assert max(gaps) < 1e-4
