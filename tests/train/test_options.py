"""What each option does to a whole run, in one process."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import CLIP, load_model, save_model
from clip_train import TrainError, metrics, train
from clip_train.step import Stepper
from safetensors.torch import load_file

from .conftest import pair, write_shard
from .test_run import assert_same_result, config, on_cpu, rows, uninterrupted, weights

__all__ = ["on_cpu", "uninterrupted"]  # fixtures


def states(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").iterdir())


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the run to stop once this step is logged."""
    append = metrics.append

    def signalling(path: Path, row: metrics.Row, name: str) -> None:
        append(path, row, name)
        if row["step"] == step:
            os.kill(os.getpid(), 10)  # SIGUSR1, Slurm's

    monkeypatch.setattr(metrics, "append", signalling)


def test_train_states_are_model_directories(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "run", keep_every=3, save_every=1, samples_seen=80, ema=0.9))
    kept = ["step-00000003", "step-00000006", "step-00000009", "step-00000010"]
    assert states(tmp_path / "run") == kept
    for name in ("model", "model-ema"):
        models = [load_model(tmp_path / "run" / "state" / step / name) for step in kept]
        assert len({model.fingerprint for model in models}) == 4
        assert [model.provenance["step"] for model in models] == [3, 6, 9, 10]
        assert load_model(tmp_path / "run" / name).fingerprint == models[-1].fingerprint
    assert (
        models[0].fingerprint != load_model(tmp_path / "run/state/step-00000003/model").fingerprint
    )


def test_ema_survives_a_stop(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"ema": 0.8}
    train(config(data, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train(config(data, tmp_path / "run", **settings)).status == "stopped"
    train(config(data, tmp_path / "run", **settings))
    assert_same_result(tmp_path / "whole", tmp_path / "run")
    files = [tmp_path / run / "model-ema/open_clip_model.safetensors" for run in ("whole", "run")]
    one, other = map(load_file, files)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["logit_scale"], weights(tmp_path / "run")["logit_scale"])


def test_micro_batches_give_the_same_run(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    train(config(data, tmp_path / "run", micro_batch_size=3, grad_checkpointing=True))
    for row, expected in zip(rows(tmp_path / "run"), rows(uninterrupted), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert row["order_hash"] == expected["order_hash"]


def test_micro_batches_repeat_their_random_numbers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch dropout draws the same patches in both passes, or the gradients would not be one."""
    forward, seen = Stepper._forward, []  # pyright: ignore[reportPrivateUsage]

    def recording(self: Stepper, *args: Any) -> Any:
        output = forward(self, *args)
        seen.append(output[0].detach())
        return output

    monkeypatch.setattr(Stepper, "_forward", recording)
    settings: dict[str, Any] = {"patch_dropout": 0.5, "micro_batch_size": 3, "samples_seen": 32}
    train(config(data, tmp_path / "run", **settings))
    assert len(seen) == 24
    for step in range(4):
        passes = seen[6 * step : 6 * step + 6]  # three micro-batches, twice
        assert all(torch.equal(passes[i], passes[i + 3]) for i in range(3))


def test_micro_batches_refuse_batch_norm(data: Path, tmp_path: Path) -> None:
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg"},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 16},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(model))
    with pytest.raises(TrainError, match="batch norm would see only micro-batches"):
        train(config(data, tmp_path / "run", model=str(tmp_path / "tiny.json"), micro_batch_size=4))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "fp16"},
        {"optimizer": "lion", "lr": 1e-4},
        {"schedule": "constant", "cooldown": 3},
        {"replacement": True},
        {"patch_dropout": 0.5},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_stopped_and_continued(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """Bit by bit what the run without a stop gives; the loss falls."""
    train(config(data, tmp_path / "whole", **changed))
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert train(config(data, tmp_path / "run", **changed)).status == "stopped"
    train(config(data, tmp_path / "run", **changed))
    assert_same_result(tmp_path / "whole", tmp_path / "run")
    found = rows(tmp_path / "run")
    assert min(row["loss"] for row in found) < found[0]["loss"]
    assert found[-1]["skipped"] == 0


@pytest.mark.parametrize("tower", ["image", "text"])
def test_locked_towers_stay(data: Path, tmp_path: Path, tower: str) -> None:
    """The image tower as LiT locks it, the text tower but its last group."""
    options = {"lock_image": 0} if tower == "image" else {"lock_text": 1}
    start = tmp_path / "start"
    train(config(data, start, samples_seen=24, warmup=0, lr=1e-9))
    before = load_model(start / "model").model.state_dict()
    train(config(data, tmp_path / "run", model=str(start / "model"), **options))
    after = load_model(tmp_path / "run" / "model").model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if tower == "image":
        assert not {name for name in moved if name.startswith("visual.")}
        assert {name for name in before if name.startswith("text.")} <= moved
    else:
        assert {name for name in moved if name.startswith("text.")} == {"text.text_projection"}
        assert "visual.proj" in moved


def test_time_limit_saves_and_stops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    clock = time.monotonic
    offset = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + offset[0])
    append = metrics.append

    def later(path: Path, row: metrics.Row, name: str) -> None:
        append(path, row, name)
        offset[0] += 600  # every step takes ten minutes

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", later)
        summary = train(
            config(data, tmp_path / "run", time_limit=45, save_minutes=15, save_every=50)
        )
    assert (summary.status, summary.step) == ("stopped", 5)
    # by the minute after the 2nd and 4th step, and where it stopped
    assert states(tmp_path / "run") == ["step-00000004", "step-00000005"]
    train(config(data, tmp_path / "run"))
    assert_same_result(uninterrupted, tmp_path / "run")


def test_unreadable_samples_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved and stopped before a batch, a run that goes on reads that batch again."""
    samples = {f"k{i:02}": pair(i) for i in range(40)}
    for i in (3, 17, 25):
        samples[f"k{i:02}"]["jpg"] = b"broken"
    write_shard(tmp_path / "0.tar", samples)
    settings: dict[str, Any] = {"max_error_share": 0.5, "save_minutes": 1e-9}
    whole = train(config(tmp_path, tmp_path / "whole", max_error_share=0.5))
    for step in range(1, 12):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            train(config(tmp_path, tmp_path / "run", **settings))
    summary = train(config(tmp_path, tmp_path / "run", **settings))
    assert (summary.status, summary.unreadable) == ("finished", whole.unreadable)


def test_rebase(data: Path, tmp_path: Path) -> None:
    """A finished constant run goes on, with twice the batch, and then cools down."""
    settings: dict[str, Any] = {"schedule": "constant", "samples_seen": 48}
    run = tmp_path / "run"
    train(config(data, run, **settings))
    longer = settings | {"samples_seen": 112, "batch_size": 16, "cooldown": 2}
    with pytest.raises(TrainError, match=r"--samples-seen was 48, is 112.*\(--rebase\)"):
        train(config(data, run, **longer))
    with pytest.raises(TrainError, match="--optimizer was adamw, is lion"):
        train(config(data, run, **longer, optimizer="lion", rebase=True))
    with pytest.raises(TrainError, match="has seen 48 already"):
        train(config(data, run, **settings | {"samples_seen": 30}, rebase=True))
    assert (run / "model").exists()
    summary = train(config(data, run, **longer, rebase=True))
    assert (summary.status, summary.step, summary.samples) == ("finished", 10, 112)
    found = rows(run)
    assert [row["samples"] for row in found] == [8, 16, 24, 32, 40, 48, 64, 80, 96, 112]
    assert [row["lr"] for row in found[2:]] == pytest.approx([1e-3] * 7 + [5e-4])
    record = json.loads((run / "run.json").read_text())
    assert record["identity"]["batch_size"] == 16
    assert record["rebased"][0]["after_step"] == 6
    assert record["rebased"][0]["was"] == {"samples_seen": 48, "batch_size": 8, "cooldown": 0}
    # each sample of the first epoch once, whatever the batch
    whole = train(config(data, tmp_path / "whole", **longer | {"batch_size": 8}))
    assert summary.order_hash != whole.order_hash  # chained batch by batch
    assert train(config(data, run, **longer, rebase=True)).status == "nothing left to do"
    assert train(config(data, run, **longer)).status == "nothing left to do"


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the pixels of steps for which `bad` holds not finite."""
    step = Stepper.step
    taken = [0]

    def poisoned(self: Stepper, images: torch.Tensor, *args: Any, **options: Any) -> Any:
        images = images.float() if bad(taken[0]) else images
        if images.is_floating_point():
            images[0] = torch.nan
        taken[0] += 1
        return step(self, images, *args, **options)

    monkeypatch.setattr(Stepper, "step", poisoned)


def test_skipped_steps_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step in (2, 5, 6))
    summary = train(config(data, tmp_path / "run", log_every=4))
    assert (summary.status, summary.skipped) == ("finished", 3)
    skipped = metrics.read_rows(tmp_path / "run", metrics.SKIPPED)
    assert [row["step"] for row in skipped] == [3, 6, 7]
    assert [row["loss"] for row in skipped] == [None] * 3  # JSON has no NaN
    assert all(len(set(row["samples"])) == 8 for row in skipped)
    folder, shard, _ = skipped[0]["samples"][0].split("/")
    assert (data / shard).exists()
    assert folder == data.name
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [1, 3, 3]


def test_many_skipped_in_a_row_stop(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved before stays, and the run can go on from it."""
    with monkeypatch.context() as patch:
        poison(patch, lambda step: step >= 5)
        with pytest.raises(TrainError, match="last 3 steps were skipped, up to step 8"):
            train(config(data, tmp_path / "run", max_skipped=3))
    assert states(tmp_path / "run") == ["step-00000004"]
    assert train(config(data, tmp_path / "run", max_skipped=3)).skipped == 0


def test_validation_in_a_run(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """Rows at every Nth step and the last, and the same training as without."""
    samples = {f"v{i}": pair(90 + i) for i in range(9)}
    write_shard(tmp_path / "held-out.tar", samples)
    labelled = tmp_path / "set"
    (labelled / "test").mkdir(parents=True)
    (labelled / "classnames.txt").write_text("dog\ncat\n")
    (labelled / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    classes = {f"s{i}": {"jpg": pair(i)["jpg"], "cls": str(i % 2).encode()} for i in range(6)}
    write_shard(labelled / "test" / "0.tar", classes)
    (labelled / "test" / "nshards.txt").write_text("1")
    summary = train(
        config(
            data,
            tmp_path / "run",
            val_data=str(tmp_path / "held-out.tar"),
            zeroshot_data=str(labelled),
            eval_every=5,
        )
    )
    found = metrics.read_rows(tmp_path / "run", metrics.VALIDATION)
    assert [(row["step"], row["samples"]) for row in found] == [(5, 40), (10, 80), (12, 96)]
    assert summary.validation == found[-1]
    assert {"val_loss", "image_to_text_recall@5", "zeroshot_top1"} <= found[-1].keys()
    assert_same_result(uninterrupted, tmp_path / "run")
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


def test_tensorboard(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(data, tmp_path / "run", tracker="tensorboard", samples_seen=32))
    events = EventAccumulator(str(tmp_path / "run" / "clip-train"))
    events.Reload()
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_missing_tracker(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_train.processes.find_spec", lambda name: None)
    with pytest.raises(TrainError, match="--tracker wandb: not installed; pip install wandb"):
        train(config(data, tmp_path / "run", tracker="wandb"))
    assert not (tmp_path / "run").exists()


def test_unknown_optimizer(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--optimizer admaw: no such optimizer; known: adamw, "):
        train(config(data, tmp_path / "run", optimizer="admaw"))
    assert not (tmp_path / "run").exists()


def test_patch_dropout_of_a_model_directory(
    data: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """The weights stay those of the directory; the new one says what it was trained with."""
    start = str(uninterrupted / "model")
    train(config(data, tmp_path / "run", model=start, patch_dropout=0.5, samples_seen=24, lr=1e-12))
    loaded, before = load_model(tmp_path / "run" / "model"), load_model(start)
    assert loaded.config.vision_cfg.patch_dropout == 0.5
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, before.model.state_dict()[name])


def test_weighted_sources(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "more")
    sources = f"{data}::{tmp_path / 'more'}"
    summary = train(config(data, tmp_path / "run", train_data=sources, train_weights="3::1"))
    assert summary.status == "finished"
    with pytest.raises(TrainError, match="train-weights"):
        train(config(data, tmp_path / "other", train_data=sources, train_weights="3"))


def test_compiled(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, the run is the same within rounding."""
    from torch._dynamo.utils import counters

    compiling = CLIP.compile  # without inductor's C++, which takes a minute
    monkeypatch.setattr(CLIP, "compile", lambda model: compiling(model, backend="aot_eager"))
    small = {"width": 32, "layers": 2}
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 16, **small},
        "text_cfg": {"heads": 2, "context_length": 16, **small},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(model))
    settings: dict[str, Any] = {"model": str(tmp_path / "tiny.json"), "samples_seen": 32}
    train(config(data, tmp_path / "plain", **settings))
    train(config(data, tmp_path / "compiled", compile=True, **settings))
    assert counters["stats"]["unique_graphs"] > 0
    for row, expected in zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_a_state_of_another_version(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "model")
    state = run / "state" / "step-00000012" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 1}))
    with pytest.raises(TrainError, match="written by another version of clip-train"):
        train(config(data, run))


def test_links_are_not_needed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    train(config(data, tmp_path / "run"))
    assert_same_result(uninterrupted, tmp_path / "run")


def test_save_model_takes_other_weights(uninterrupted: Path, tmp_path: Path) -> None:
    loaded = load_model(uninterrupted / "model")
    state = {name: torch.zeros_like(t) for name, t in loaded.model.state_dict().items()}
    save_model(tmp_path / "zeros", loaded.model, loaded.preprocess, state=state)
    assert not any(t.any() for t in load_model(tmp_path / "zeros").model.state_dict().values())
    assert loaded.model.logit_scale != 0
