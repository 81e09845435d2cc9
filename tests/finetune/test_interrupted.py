"""A run that is killed, stopped or run again."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from clip_finetune import FinetuneError, TrainConfig, train
from clip_finetune.processes import stop_signals
from clip_finetune.state import TrainState
from clip_models import load_head

from .conftest import config, equal, metrics


def in_a_fork(base: Path, out: Path, settings: TrainConfig) -> int:
    """Start the run in a forked process; its id."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # a forked child has no OpenMP threads to share work with
        status = 1
        with contextlib.suppress(BaseException):
            train(base, out, settings)
            status = 0
        os._exit(status)
    return process


def steps_logged(out: Path) -> int:
    file = out.with_name(out.name + ".state") / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.slow
def test_killed_ten_times(base: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    """SIGKILL at ten random points, with everything on that has a state: the same weights."""
    settings = config(
        digits_set, inverted_set, iterations=60, batch_size=8, save_every=2, method="end-to-end",
        ema=0.9, drop_path=0.3, augment="rand-m9-n2", random_erasing=0.5, layer_decay=0.7,
    )  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert os.waitpid(in_a_fork(base, whole, settings), 0)[1] == 0
    rng = random.Random(0)
    for step in sorted(rng.sample(range(1, 59), 10)):
        process = in_a_fork(base, out, settings)
        while steps_logged(out) < step:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)  # also in the middle of a save
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert os.waitpid(in_a_fork(base, out, settings), 0)[1] == 0
    assert equal(out, whole)
    assert metrics(out) == metrics(whole)
    for name in ("digits", "inverted"):
        assert torch.equal(load_head(out, name).weight, load_head(whole, name).weight)
    assert not out.with_name("out.state").exists()


def test_killed_while_the_model_is_written(base: Path, digits_set: Path, tmp_path, monkeypatch):
    settings = config(digits_set, save_every=5)
    train(base, tmp_path / "whole", settings)

    def die(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_finetune.publish.save_head", die)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    train(base, tmp_path / "out", settings)
    assert equal(tmp_path / "out", tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_then_continued(base: Path, digits_set: Path, tmp_path, monkeypatch, number: int):
    settings = config(digits_set, workers=1)
    train(base, tmp_path / "whole", settings)
    log = TrainState.log

    def log_then_signal(self: TrainState, row: dict[str, float]) -> None:
        log(self, row)
        if row["step"] == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainState, "log", log_then_signal)
    before = signal.getsignal(number)
    result = train(base, tmp_path / "out", settings)
    assert result["status"] == "stopped"
    assert 7 <= result["step"] <= 8
    assert signal.getsignal(number) == before
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert train(base, tmp_path / "out", settings)["status"] == "trained"
    assert equal(tmp_path / "out", tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


def test_only_a_later_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    """torchrun passes on to its children what they got as well."""
    ended: list[int] = []
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with stop_signals() as told:
        for number in [signal.SIGTERM] * 2 + [signal.SIGINT] * 2:
            assert callable(signal.getsignal(number))
            os.kill(os.getpid(), number)
        assert told.is_set()
        assert not ended
        now[0] += 2
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]


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


def test_state_of_another_run(base: Path, digits_set: Path, tmp_path: Path, monkeypatch):
    def stop(_self: TrainState, row: dict[str, float]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "out", config(digits_set, save_every=5))
    with pytest.raises(FinetuneError, match=r"another run's \(arguments.seed is 0 there, 1 here"):
        train(base, tmp_path / "out", config(digits_set, seed=1))
