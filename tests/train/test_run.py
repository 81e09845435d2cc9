"""Whole runs in this process: resumption, refusals, what is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import clip_train
import pytest
import torch
from clip_models import architecture, load_model
from clip_train import TrainConfig, TrainError, loop, metrics, processes, train
from clip_train.state import newest_state
from safetensors.torch import load_file

from .conftest import pair, write_shard


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def config(data: Path, output: Path, **changed: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": "XS",
        "train_data": str(data),
        "output": output,
        "samples_seen": 96,
        "batch_size": 8,
        "warmup": 2,
        "lr": 1e-3,
        "workers": 0,
        "log_every": 1,
        "save_every": 4,
    }
    return TrainConfig(**(values | changed))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "open_clip_model.safetensors")


def rows(run: Path) -> list[metrics.Row]:
    timed = ("samples_per_second", "samples_per_second_per_device", "tflops", "data_wait")
    return [{k: v for k, v in row.items() if k not in timed} for row in metrics.read_rows(run)]


def assert_same_result(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rows(one) == rows(other)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of 8 over 70 pairs, never stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(config(data, run))
    return run


def test_what_a_run_leaves(data: Path, uninterrupted: Path) -> None:
    assert sorted(p.name for p in uninterrupted.iterdir()) == [
        ".lock", "loss.png", "metrics.jsonl", "model", "run.json", "state",
    ]  # fmt: skip
    assert [p.name for p in sorted((uninterrupted / "state").iterdir())] == [
        "step-00000008", "step-00000012",
    ]  # fmt: skip
    found = metrics.read_rows(uninterrupted)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert list(found[0]) == [
        "step", "samples", "loss", "lr", "logit_scale", "grad_norm", "unreadable", "skipped",
        "order_hash", "samples_per_second", "samples_per_second_per_device", "tflops", "data_wait",
    ]  # fmt: skip
    assert found[-1]["loss"] < found[0]["loss"]
    loaded = load_model(uninterrupted / "model")
    assert loaded.provenance["samples_seen"] == 96
    assert loaded.provenance["initial_model"] == architecture("XS").to_dict()
    assert loaded.provenance["order_hash"] == found[-1]["order_hash"]
    assert loaded.provenance["arguments"]["train_data"] == str(data)
    assert loaded.provenance["tool"].startswith("clip-train ")


def test_finished_run_has_nothing_left_to_do(data: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "run.json").stat().st_mtime_ns
    summary = train(config(data, uninterrupted, workers=1, log_every=7))  # free to differ
    assert summary.status == "nothing left to do"
    assert (summary.step, summary.samples) == (12, 96)
    assert summary.order_hash == rows(uninterrupted)[-1]["order_hash"]
    assert (uninterrupted / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("stop_at", [1, 4, 6, 11])
def test_sigterm_then_resume(
    data: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    run, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    append = metrics.append

    def signalling(path: Path, row: metrics.Row, name: str) -> None:
        append(path, row, name)
        if row["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", signalling)
        summary = train(config(data, run))
    assert (summary.status, summary.step, summary.model) == ("stopped", stop_at, None)
    assert not (run / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(config(data, run)).status == "finished"
    assert_same_result(uninterrupted, run)


@pytest.mark.parametrize("die_at", [2, 7])
def test_crash_then_resume(
    data: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    """Before the first save: from the start; after it: from step 4, rows 5 to 7 rewritten."""
    run = tmp_path / "run"
    append = metrics.append

    def dying(path: Path, row: metrics.Row, name: str) -> None:
        append(path, row, name)
        if row["step"] == die_at:
            with (path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 8, "los')
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, run))
    (run / "state" / ".step-00000008").mkdir()  # half a save
    assert train(config(data, run)).status == "finished"
    assert_same_result(uninterrupted, run)


def test_changed_settings_are_refused(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    changed = config(data, uninterrupted, lr=2e-3, seed=1, precision="bf16")
    with pytest.raises(TrainError) as error:
        train(changed)
    for part in ("--lr was 0.001, is 0.002", "--seed was 0, is 1", "--precision was fp32, is bf16"):
        assert part in str(error.value)
    write_shard(tmp_path / "0.tar", {"a": pair(0)})
    with pytest.raises(TrainError, match="--train-data was sha256"):
        train(config(tmp_path, uninterrupted))


def test_settings_may_change_until_something_is_saved(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainError, match="not a clip-train run"):
        train(config(data, tmp_path.parent))
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"identity": {"lr": 5}}))
    assert train(config(data, run, samples_seen=24)).status == "finished"


def test_continues_from_a_model_directory(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    summary = train(config(data, tmp_path / "run", model=str(uninterrupted / "model")))
    assert summary.loss is not None
    assert rows(tmp_path / "run")[0]["loss"] < rows(uninterrupted)[0]["loss"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["identity"]["model"] == load_model(uninterrupted / "model").fingerprint


def test_model_from_json(data: Path, tmp_path: Path) -> None:
    """A timm tower with batch norm: its running statistics are part of the state."""
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg"},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 16},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(model))
    settings: dict[str, Any] = {"model": str(tmp_path / "tiny.json")}
    for name in ("one", "two"):
        train(config(data, tmp_path / name, **settings))
    assert_same_result(tmp_path / "one", tmp_path / "two")
    assert any("running_mean" in name for name in weights(tmp_path / "one"))
    state = newest_state(tmp_path / "two")
    assert state is not None
    for name in ("model", "run.json"):  # as if it had been killed at step 8
        (tmp_path / "two" / name).rename(tmp_path / f"old-{name}")
    (tmp_path / "old-run.json").rename(tmp_path / "two" / "run.json")
    train(config(data, tmp_path / "two", **settings))
    assert_same_result(tmp_path / "one", tmp_path / "two")


def test_bf16_is_close_to_fp32(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    train(config(data, tmp_path / "run", precision="bf16"))
    pairs = zip(rows(tmp_path / "run"), rows(uninterrupted), strict=True)
    gaps = [abs(bf16["loss"] - fp32["loss"]) for bf16, fp32 in pairs]
    assert 0 < max(gaps) < 0.05
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_too_many_unreadable_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = {f"k{i:02}": pair(i) for i in range(40)}
    for i in (3, 17, 25):
        samples[f"k{i:02}"]["jpg"] = b"broken"
    write_shard(tmp_path / "0.tar", samples)
    with pytest.raises(TrainError, match=r"unreadable samples .*--max-error-share 0.05"):
        train(config(tmp_path, tmp_path / "strict"))
    assert "0.tar/k17: not a readable image" in caplog.text
    step = metrics.read_rows(tmp_path / "strict")[-1]["step"]  # not one of --save-every
    assert newest_state(tmp_path / "strict") == tmp_path / f"strict/state/step-{step:08}"
    assert step % 4
    summary = train(config(tmp_path, tmp_path / "lenient", max_error_share=0.2))
    assert summary.status == "finished"
    assert summary.unreadable >= 7  # three an epoch, 2.4 epochs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "ViT-Z-1"}, "no such model directory or architecture.*ViT-B-32"),
        ({"train_data": "/nonexistent"}, "no file /nonexistent"),
    ],
)
def test_nothing_is_written_on_bad_input(
    data: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        train(config(data, tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


def test_processes_that_the_launcher_did_not_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process with these variables."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(TrainError, match="asked for several processes, but this one finds 1"):
        train(config(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [0, 1], ids=["settings", "train state"])
def test_processes_must_see_the_same_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls: list[Any] = []

    def gather(found: list[Any]) -> list[Any]:
        calls.append(found)
        return [*found, "another"] if len(calls) > call else found * 2

    monkeypatch.setattr(processes, "gather_object", gather)
    with pytest.raises(TrainError, match="--output must be on a disk that all share"):
        train(config(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_directory_has_one_run_at_a_time(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    code = (
        "import sys; from pathlib import Path; from clip_train.state import lock_run\n"
        "lock = lock_run(Path(sys.argv[1])); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(TrainError, match="another process is training it"):
            train(config(data, run))
        other.kill()
    assert not (run / "run.json").exists()
    train(config(data, run, samples_seen=24))


def test_srun_without_a_launcher(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(TrainError, match=r"srun started 8 tasks.*torchrun or accelerate launch"):
        train(config(data, tmp_path / "run"))


def test_out_of_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Stepper, "step", step)
    with pytest.raises(TrainError, match=r"CUDA out of memory.*--micro-batch-size.*-checkpointing"):
        train(config(data, tmp_path / "run"))


def test_settings_of_accelerate_that_are_not_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setattr(processes, "_live_with_the_launcher", lambda: None)
    processes.start_processes(config(data, tmp_path / "run"))
    warned = [r.message.rpartition("--")[2] for r in caplog.records if r.name.startswith("clip")]
    assert warned == ["precision", "compile", "micro-batch-size"]
    caplog.clear()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    processes.start_processes(config(data, tmp_path / "run", precision="bf16"))
    assert not caplog.records


def test_only_a_later_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on to its children what they got as well."""
    ended: list[int] = []
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with processes.Agreement(1) as agreement:
        for number in [signal.SIGTERM] * 2 + [signal.SIGINT] * 2:
            assert signal.getsignal(number) == agreement._request_stop  # pyright: ignore[reportPrivateUsage]
            os.kill(os.getpid(), number)
        assert not ended
        assert agreement.stop_requested
        now[0] += 2
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]


def test_auto_precision_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 emulates bf16; TF32 is for fp32 towers, not for the loss beside bf16 ones."""
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    cuda = torch.device("cuda")
    for native in (True, False):

        def supported(including_emulation: bool = True, native: bool = native) -> bool:
            return including_emulation or native

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert processes.choose_precision("auto", cuda) == ("bf16" if native else "fp32")
    assert set_to == ["highest", "high"]


def test_loss_is_plotted(uninterrupted: Path) -> None:
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_public_names() -> None:
    assert clip_train.__all__ == ["Summary", "TrainConfig", "TrainError", "train"]
    assert all(hasattr(clip_train, name) for name in clip_train.__all__)
    assert clip_train.train is loop.train
