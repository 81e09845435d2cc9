"""`sweep` from end to end on digits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_probe.probes import GRID
from PIL import Image

Run = Callable[..., list[dict[str, Any]]]
Fail = Callable[..., str]
Digits = list[tuple[bytes, int]]
WriteSet = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path_factory.mktemp("sweep") / "model")


def test_sweep_saves_a_head_that_eval_confirms(
    run: Run, fail: Fail, model: Path, digits: Path, tmp_path: Path
) -> None:
    arguments = ("sweep", model, digits, "--val-split", "val", "--shots", "1,4", "--seeds", 2)
    saved = ("--save-head", "probe", "--output", tmp_path / "out")
    (result,) = run(*arguments, *saved)
    full, few = result["full"], result["few_shot"]
    assert result["samples"] == {"train": 300, "val": 100, "test": 400}
    assert [row["shots"] for row in few] == [1, 4]
    assert len(few[1]["draws"]) == 2
    assert full["train_samples"] == 400
    assert few[1]["draws"][0]["train_samples"] == 40
    assert result["grid"] == list(GRID)
    assert len(full["val_acc1"]) == len(GRID)
    assert full["c"] == GRID[full["val_acc1"].index(max(full["val_acc1"]))]
    assert full["acc1"] > few[1]["acc1_mean"] > few[0]["acc1_mean"] > result["majority_class_share"]

    (zero_shot,) = run("zeroshot", model, digits)
    assert result["zero_shot"]["acc1"] == zero_shot["acc1"]
    (confirmed,) = run("eval", model, digits, "--head", "probe")
    assert (confirmed["kind"], confirmed["feature"]) == ("probe", "post")
    for key in ("acc1", "acc5", "mean_per_class_recall", "acc1_ci95"):
        assert confirmed[key] == full[key]

    out = tmp_path / "out"
    assert json.loads((out / "sweep.json").read_text()) == result
    assert Image.open(out / "shots.png").format == "PNG"
    assert sorted(file.name for file in out.iterdir()) == ["shots.png", "sweep.json"]

    before = (out / "sweep.json").stat().st_mtime_ns
    assert run(*arguments, *saved) == [result]  # nothing left to do
    assert (out / "sweep.json").stat().st_mtime_ns == before
    line = fail("sweep", model, digits, "--shots", "1", "--output", out)
    assert "holds another sweep (it differs in splits, digests, shots, seeds" in line
    assert "has a head 'probe' already" in fail(*arguments, "--save-head", "probe")


def test_a_sweep_killed_before_its_head_was_saved_completes(
    run: Run, model: Path, digits: Path, tmp_path: Path
) -> None:
    arguments = ("sweep", model, digits, "--shots", "", "--output", tmp_path / "out")
    arguments = (*arguments, "--save-head", "late")
    (result,) = run(*arguments)
    (model / "heads" / "late.safetensors").unlink()
    assert run(*arguments) == [result]
    assert (model / "heads" / "late.safetensors").is_file()


def test_global_random_state_changes_nothing(run: Run, model: Path, digits: Path) -> None:
    arguments = ("sweep", model, digits, "--shots", "2", "--seeds", 1)
    torch.manual_seed(1)
    first = run(*arguments)
    torch.manual_seed(2)
    assert run(*arguments) == first
    assert first[0]["few_shot"][0]["acc1_std"] is None


def test_other_features(run: Run, fail: Fail, model: Path, digits: Path) -> None:
    (pre,) = run("sweep", model, digits, "--shots", "", "--feature", "pre", "--save-head", "pre")
    (confirmed,) = run("eval", model, digits, "--head", "pre")
    assert confirmed["feature"] == "pre"
    assert confirmed["acc1"] == pre["full"]["acc1"]
    (pixels,) = run("sweep", model, digits, "--shots", "", "--feature", "pixels")
    assert pixels["full"]["acc1"] > 0.9
    assert pixels["zero_shot"] == pre["zero_shot"] is not None
    line = fail("sweep", model, digits, "--feature", "pixels", "--save-head", "x")
    assert "--save-head" in line


def test_corrupt_images_can_make_a_class_too_rare(
    fail: Fail, model: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    others = [row for row in rows[:100] if row[1] != 5]
    train = [*others, (b"corrupt", 5), next(row for row in rows if row[1] == 5)]
    path = write_set(tmp_path / "set", {"train": train, "test": rows[300:400]})
    assert "class 'five' has 1 usable images" in fail("sweep", model, path, "--shots", "2")


def test_classes_absent_or_rare(
    run: Run, fail: Fail, model: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    train = [row for row in rows[:300] if row[1] != 7]
    rare = [row for row in train if row[1] == 2][3:]
    train = [row for row in train if row not in rare]
    path = write_set(tmp_path / "set", {"train": train, "test": rows[300:400]})
    line = fail("sweep", model, path)
    assert "class 'two' has 3 usable images" in line
    assert "fewer than 4 shots: use --shots '1,2'" in line
    (path / "zeroshot_classification_templates.txt").unlink()
    (result,) = run("sweep", model, path, "--shots", "3", "--seeds", 1)
    assert result["classes_absent_from_train"] == ["seven"]
    assert result["zero_shot"] is None
    assert result["few_shot"][0]["draws"][0]["train_samples"] == 27
    assert "no split 'dev'" in fail("sweep", model, path, "--val-split", "dev")
