"""Every run of the paper by name, and what a run would be before it is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from clip_train import TrainConfig
from clip_train.cli import main
from clip_train.dry_run import plan_run
from clip_train.recipes import RECIPES

from .conftest import arguments

# The paper's table of architectures: GMACs of a pair, millions of parameters.
PAPER = {
    "ViT-B-32": (7.40, 151.28),
    "ViT-B-16": (20.57, 149.62),
    "ViT-L-14": (87.73, 427.62),
    "ViT-H-14": (190.97, 986.11),
    "ViT-g-14": (290.74, 1366.68),
}


def dry_run(*options: object) -> dict[str, object]:
    result = CliRunner().invoke(main, [*map(str, options), "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", RECIPES)
def test_every_run_of_the_paper(name: str, data: Path, tmp_path: Path) -> None:
    plan = dry_run("--recipe", name, "--train-data", data, "--output", tmp_path / "run")
    recipe = RECIPES[name]
    gmacs, parameters = PAPER[recipe.model]
    assert plan["gmacs"] == pytest.approx(gmacs, rel=0.003)
    assert plan["parameters"] == pytest.approx(parameters * 1e6, abs=0.015e6)
    assert plan["total_gmacs"] == pytest.approx(plan["gmacs"] * recipe.samples_seen)
    told = {field: plan[field] for field in recipe._fields}
    assert told == recipe._asdict()
    assert plan["steps"] == -(-recipe.samples_seen // recipe.batch_size)
    assert not (tmp_path / "run").exists()


def test_the_names_say_what_is_in_them() -> None:
    assert len(RECIPES) == 29
    budgets = {"3b": (2.4e9, 2.6e9), "13b": (12.2e9, 13.3e9), "34b": (32e9, 35e9)}
    for name, recipe in RECIPES.items():
        low, high = budgets[name.rsplit("-", 1)[1]]
        assert low <= recipe.samples_seen <= high
        assert name.startswith(recipe.model.removeprefix("ViT-"))


def test_options_beside_a_recipe_win(data: Path, tmp_path: Path) -> None:
    options = ["--recipe", "B-32-laion2b-3b", "--train-data", data, "--output", tmp_path / "run"]
    plan = dry_run(*options, "--model", "XS", "--batch-size", 1000, "--warmup", 7)
    assert (plan["model"], plan["batch_size"], plan["warmup"]) == ("XS", 1000, 7)
    assert (plan["samples_seen"], plan["lr"]) == (2_560_013_280, 1e-3)


def test_what_looks_wrong(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    values = {"model": "XS", "train_data": str(data), "output": tmp_path, "samples_seen": 700}
    plan = plan_run(TrainConfig(**values, batch_size=100, warmup=6))
    assert plan.batch_per_process == pytest.approx(100 / 3)
    assert (plan.shards, plan.pairs) == (4, None)
    assert [w for w in plan.warnings if "sizes.json" in w]
    assert [w for w in plan.warnings if "not a multiple of 3 processes" in w]
    assert [w for w in plan.warnings if "86% of the 7 steps" in w]
    assert not [w for w in plan.warnings if "more than" in w]


def test_warnings_of_counted_data(data: Path, tmp_path: Path) -> None:
    for tar in data.glob("*.tar"):
        (tmp_path / tar.name).symlink_to(tar)
    sizes = {"00000.tar": 20, "00001.tar": 25, "00002.tar": 5, "00003.tar": 20}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    values = {"model": "XS", "train_data": str(tmp_path), "output": tmp_path / "run"}
    plan = plan_run(TrainConfig(**values, samples_seen=700, batch_size=100, warmup=0, workers=5))
    assert (plan.shards, plan.pairs, plan.epochs) == (4, 70, 10.0)
    assert [w for w in plan.warnings if "4 shards for 5 loader processes" in w]
    assert [w for w in plan.warnings if "more than the 70 pairs" in w]
    calm = plan_run(TrainConfig(**values, samples_seen=700, batch_size=70, warmup=0, workers=2))
    assert calm.warnings == []


def test_data_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    plan = dry_run(*arguments(tmp_path / "absent", tmp_path / "run"))
    assert plan["shards"] is None
    assert "no file" in plan["warnings"][0]


def test_an_unknown_recipe_is_a_usage_error(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("clip-train"), "--recipe", "B-32"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "'B-32' is not one of 'B-32-laion80m-3b'" in result.stderr
