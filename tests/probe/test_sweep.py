"""`sweep` from end to end on digits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import load_head, load_model, save_model
from clip_probe import ProbeError
from clip_probe.probes import GRID, find_probes
from clip_probe.sweeps import sweep
from PIL import Image

from .conftest import invoke

Run = Callable[..., list[dict[str, Any]]]
Fail = Callable[..., str]
Digits = list[tuple[bytes, int]]
WriteSet = Callable[..., Path]
KillAt = Callable[[int, Callable[[], object]], bool]


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
    assert full["c_not_converged"] == few[0]["draws"][0]["c_not_converged"] == []
    assert full["train_samples"] == 400
    assert few[1]["draws"][0]["train_samples"] == 40
    assert result["grid"] == [{"c": c} for c in GRID]
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
    assert sorted(file.name for file in out.iterdir()) == [
        "grid.png",
        "predictions.parquet",
        "shots.png",
        "sweep.json",
        "sweep.md",
    ]

    before = (out / "sweep.json").stat().st_mtime_ns
    assert run(*arguments, *saved) == [result]  # nothing left to do
    assert (out / "sweep.json").stat().st_mtime_ns == before
    line = fail("sweep", model, digits, "--shots", "1", "--output", out)
    assert "holds another sweep (it differs in splits, digests, shots, seeds" in line
    assert "has a head 'probe' already" in fail(*arguments, "--save-head", "probe")
    line = fail(*arguments, "--templates", "simple-imagenet", "--output", out)
    assert "it differs in templates_hash)" in line
    quick = shutil.copytree(model, tmp_path / "quick")
    config = (quick / "open_clip_config.json").read_text()
    config = config.replace('"embed_dim"', '"quick_gelu": true, "embed_dim"')
    (quick / "open_clip_config.json").write_text(config)
    line = fail("sweep", quick, *arguments[2:], "--output", out)
    assert "it differs in model_config)" in line
    (out / "sweep.json").write_text(json.dumps({**result, "head": None}))
    assert "has a head 'probe' already" in fail(*arguments, *saved)  # of another sweep


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
    assert result["classes_absent"]["train"] == ["seven"]
    assert result["zero_shot"] is None
    assert result["few_shot"][0]["draws"][0]["train_samples"] == 27
    assert "no split 'dev'" in fail("sweep", model, path, "--val-split", "dev")


def test_the_papers_protocol_is_labelled_and_chooses_on_test(
    run: Run, fail: Fail, model: Path, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (result,) = run(
        *("sweep", model, digits, "--paper", "--shots", "4", "--seeds", 1, "--output", out),
        *("--save-head", "paper"),
    )
    full = result["full"]
    assert result["solver"] == "adam"
    assert "on TEST" in result["choice"]
    assert "on TEST" in (out / "sweep.md").read_text()
    assert result["grid"] == [
        {"lr": lr, "epochs": epochs, "weight_decay": 0.0}
        for lr in (0.1, 0.01, 0.001)
        for epochs in (10, 20, 40)
    ]
    assert full["acc1"] == max(full["test_acc1"])
    assert full["train_samples"] == 300
    assert "val_acc1" not in full
    assert result["few_shot"][0]["draws"][0]["train_samples"] == 40
    (confirmed,) = run("eval", model, digits, "--head", "paper")
    assert confirmed["acc1"] == full["acc1"]
    assert "leave --val-split out" in fail("sweep", model, digits, "--paper", "--val-split", "val")


def test_adam_from_the_zero_shot_head(run: Run, fail: Fail, model: Path, digits: Path) -> None:
    arguments = ("sweep", model, digits, "--val-split", "val", "--shots", "1", "--seeds", 1)
    (result,) = run(*arguments, "--solver", "adam", "--start", "zero-shot")
    assert (result["solver"], result["start"]) == ("adam", "zero-shot")
    assert len(result["grid"]) == len(result["full"]["val_acc1"]) == 45
    assert {"lr", "epochs", "weight_decay"} <= set(result["full"])
    assert result["full"]["acc1"] > result["zero_shot"]["acc1"]
    assert "--start zero-shot takes --solver adam" in fail(*arguments, "--start", "zero-shot")


def test_scikit_learn_as_solver_gives_the_same_result(run: Run, model: Path, digits: Path) -> None:
    arguments = ("sweep", model, digits, "--val-split", "val", "--shots", "2", "--seeds", 1)
    (ours,), (theirs,) = run(*arguments), run(*arguments, "--solver", "sklearn")
    assert ours["full"]["acc1"] == pytest.approx(theirs["full"]["acc1"], abs=0.0051)
    assert ours["full"]["val_acc1"][:9] == pytest.approx(theirs["full"]["val_acc1"][:9], abs=0.011)


def test_a_loose_tolerance_stops_further_from_the_optimum(
    run: Run, model: Path, digits: Path
) -> None:
    arguments = ("sweep", model, digits, "--val-split", "val", "--shots", "")
    heads = []
    for name, tolerance in (("tight", 1e-9), ("usual", 1e-7), ("loose", 0.1)):
        (result,) = run(*arguments, "--tolerance", tolerance, "--save-head", name)
        assert result["tolerance"] == tolerance
        heads.append(load_head(model, name).weight)
    assert (heads[2] - heads[0]).norm() > 10 * (heads[1] - heads[0]).norm()


@pytest.mark.parametrize(("rename", "left"), [(1, 3), (3, 1), (6, 1)])
def test_killed_and_continued_gives_the_same_files(
    run: Run,
    fail: Fail,
    model: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: KillAt,
    rename: int,
    left: int,
) -> None:
    """Killed when the first row, the first picture or the result is to take its place."""
    arguments = ("sweep", model, digits, "--val-split", "val", "--shots", "1,2", "--seeds", 2)
    whole, again = tmp_path / "whole", tmp_path / "again"
    (expected,) = run(*arguments, "--output", whole)
    assert kill_at(rename, lambda: invoke(*arguments, "--output", again))
    assert not (again / "sweep.json").exists()
    if rename > 1:
        line = fail(*arguments, "--output", again, "--solver", "adam")
        assert "differs in solver, tolerance, grid" in line

    fits: list[int] = []

    def counted(*given: Any) -> Any:
        fits.append(0)
        return find_probes(*given)

    monkeypatch.setattr("clip_probe.sweeps.find_probes", counted)
    assert run(*arguments, "--output", again) == [expected]
    assert len(fits) == left  # of two numbers of shots and the full data
    assert {file.name for file in again.iterdir()} == {file.name for file in whole.iterdir()}
    for file in whole.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_class_absent_from_one_split(
    run: Run, model: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    """Absent from val or test it judges nothing; from train it is never right; all are told."""
    splits = {
        "train": [row for row in rows[:300] if row[1] != 7],
        "val": [row for row in rows[300:400] if row[1] != 3],
        "test": [row for row in rows[400:500] if row[1] != 5],
    }
    path = write_set(tmp_path / "set", splits)
    (result,) = run(
        *("sweep", model, path, "--val-split", "val", "--shots", "2", "--seeds", 1),
        *("--save-head", "absent"),
    )
    assert result["classes_absent"] == {"train": ["seven"], "val": ["three"], "test": ["five"]}
    # 7 is in val, which the full probe is refitted with; the few-shot probes never saw it
    assert result["full"]["train_samples"] == len(splits["train"]) + len(splits["val"])
    assert result["full"]["classes_present"] == 9


def test_no_image_can_be_held_out(
    fail: Fail, model: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    few = [row for label in range(10) for row in [r for r in rows if r[1] == label][:4]]
    path = write_set(tmp_path / "set", {"train": few, "test": rows[300:400]})
    line = fail("sweep", model, path, "--shots", "2", "--seeds", 1)
    assert "give a validation split with --val-split" in line


def test_features_that_are_not_finite(
    fail: Fail, model: Path, digits: Path, tmp_path: Path
) -> None:
    broken = load_model(model)
    with torch.no_grad():
        broken.model.visual.proj.fill_(float("nan"))
    save_model(tmp_path / "broken", broken.model, broken.preprocess)
    line = fail("sweep", tmp_path / "broken", digits, "--shots", "1")
    assert "are not finite" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "lbfsg"}, "solver 'lbfsg' is none of lbfgs, sklearn, adam"),
        ({"feature": "prre"}, "feature 'prre' is none of post, pre, pixels"),
        ({"start": "zeroshot"}, "start 'zeroshot' is none of random, zero-shot"),
        ({"paper": "no"}, "paper 'no' is none of True, False"),
        ({"shots": [0, 4]}, r"shots \[0, 4\]: expected a list of whole numbers from 1 on"),
        ({"shots": 16}, "shots 16: expected a list"),
        ({"seeds": 0}, "seeds 0: expected a whole number"),
        ({"tolerance": 0.0}, "tolerance 0.0: expected a number between 0 and 1"),
        ({"tolerance": 1e-4, "solver": "adam"}, "--tolerance is that of --solver lbfgs"),
    ],
)
def test_options_that_are_none(
    model: Path, digits: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ProbeError, match=says):
        sweep(load_model(model), digits, **options)


def test_several_labels_an_image(fail: Fail, model: Path, properties: Path) -> None:
    assert "multi-label" in fail("sweep", model, properties)
