"""The commands as a user calls them."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from fits import fit_points
from law import laws
from PIL import Image
from plots import plot
from points import read_points
from scaling import main
from settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]
SCALING = Path(__file__).parents[2] / "tools" / "scaling"
DATACOMP = Path(__file__).parent / "datacomp.csv"


def test_help_needs_no_heavy_import() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(SCALING)!r})
from scaling import main
try:
    main(["fit", "--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "numpy", "scipy", "matplotlib"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--holdout-largest" in result.stdout


def test_every_command_and_option_has_help() -> None:
    assert set(main.commands) == {
        "fit",
        "predict",
        "frontier",
        "compare",
        "profile",
        "check",
        "plot",
    }
    for name, command in main.commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]}"


def test_the_tool_imports_none_of_the_six() -> None:
    for file in SCALING.glob("*.py"):
        text = file.read_text()
        assert "clip_" not in text.replace("open_clip_config", ""), file
        assert len(text.splitlines()) <= 300, file


@pytest.mark.slow
def test_another_published_table(run: Run, tmp_path: Path) -> None:
    """DataComp (2304.14108), from open_clip's docs/datacomp_models.md: a table of our columns."""
    result = run(
        "fit",
        DATACOMP,
        "--saturating",
        "--holdout-largest",
        1,
        "--json",
        "fit.json",
        "--plot",
        "fit.png",
    )
    assert result.returncode == 0, result.stderr
    (law,) = map(json.loads, result.stdout.splitlines())
    assert law["runs"] == 25
    assert law["verdict"] == "too few points to say"  # four scales, so a frontier of four
    result = run("fit", DATACOMP, "--points", "all")
    (law,) = json.loads(result.stdout)["fits"]
    assert law["verdict"] == "power law"
    low, high = law["interval_95"]["exponent"]
    assert -0.25 < low < law["exponent"] < high < -0.1
    result = run("fit", DATACOMP, "--by", "data", "--metric", "imagenet1k")
    assert result.returncode == 0, result.stderr
    assert [fit["group"] for fit in json.loads(result.stdout)["fits"]] == [
        "none",
        "basic",
        "text",
        "image",
        "laion",
        "clip",
        "datacomp",
    ]


@pytest.mark.slow
def test_fit_predict_compare_plot(run: Run, published: Path, tmp_path: Path) -> None:
    """And that everything written is the same, byte for byte, from the same seed."""
    fit = f"fit {published}/zero_shot.csv --percent --points binned --bootstrap 300 "
    fit += "--metric imagenet1k --metric coco_image_recall@5"
    result = run(*fit.split(), "--json", "fit.json", "--plot", "fit.svg")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4
    assert run(*fit.split()).stdout == (tmp_path / "fit.json").read_text()
    assert run("plot", "fit.json", "again.svg").returncode == 0
    assert (tmp_path / "fit.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert not list(tmp_path.glob("*.part"))

    big = ("predict", "fit.json", "--model", "ViT-G-14", "--samples", "68431790112")
    result = run(*big, "--metric", "imagenet1k")
    said = {row["group"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert 100 * (1 - said["openclip"]["error"]) == pytest.approx(81.92, abs=0.006)
    low, high = said["openclip"]["interval_95"]
    assert low < said["openclip"]["error"] < high
    assert said["openclip"]["beyond"] == pytest.approx(0.74, abs=0.01)
    assert "decades" in said["openclip"]["warning"]
    assert "decades" in result.stderr
    near = run("predict", "fit.json", "--gmacs", "87.73", "--samples", "34e9")
    rows = [json.loads(line) for line in near.stdout.splitlines()]
    assert ["warning" in row for row in rows if row["group"] == "openclip"] == [False, False]

    rows = [json.loads(line) for line in run("compare", "fit.json").stdout.splitlines()]
    assert [row["quantity"] for row in rows] == ["imagenet1k", "coco_image_recall@5"]
    assert all(row["differ"] is None and "openai" in row["why"] for row in rows)


def test_pictures(published: Path) -> None:
    points = read_points(published / "zero_shot.csv", ["imagenet1k"], percent=True)
    fitted = laws(points, Settings(points="binned", bootstrap=200))
    for suffix in (".png", ".svg", ".pdf"):
        assert plot(fitted, suffix) == plot(fitted, suffix)
    assert Image.open(io.BytesIO(plot(fitted, ".png"))).size[0] > 800
    text = plot(fitted, ".svg").decode()
    assert "ViT-g-14" in text  # a comment beside each label's outlines
    assert "<dc:date>" not in text


def test_frontier_and_profile(run: Run, published: Path, tmp_path: Path) -> None:
    result = run("frontier", published / "zero_shot.csv", "--percent", "--metric", "imagenet1k")
    groups = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(g["frontier"]) + len(g["off"]) for g in groups] == [3, 29]
    assert json.loads(run("profile", "ViT-H-14").stdout)["gmacs"] == pytest.approx(190.97, rel=3e-3)
    config = {
        "embed_dim": 64,
        "vision_cfg": {"width": 64, "layers": 2, "patch_size": 16, "image_size": 64},
        "text_cfg": {"width": 64, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert json.loads(run("profile", tmp_path).stdout)["parameters"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "none.csv"), "none.csv"),
        (("fit", "bad.csv"), "row 2"),
        (("predict", "bad.csv", "--model", "x", "--samples", "1"), "fit --json"),
        (("predict", "other.json", "--model", "x", "--samples", "1"), "fit --json"),
        (("predict", "fit.json", "--model", "x", "--samples", "1"), "--gmacs"),
        (("plot", "fit.json", "picture.bmp"), ".svg"),
        (("compare", "fit.json"), "two groups"),
        (("profile", "no-model"), "ViT-B-32"),
        (("profile", "timm.json"), "no closed form"),
    ],
)
def test_expected_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATACOMP, tmp_path)
    (tmp_path / "bad.csv").write_text("model,samples_seen,in\nViT-B-32,1e9,77\n")
    (tmp_path / "other.json").write_text("{}")
    config = {"embed_dim": 1, "vision_cfg": {"timm_model_name": "x"}, "text_cfg": {}}
    (tmp_path / "timm.json").write_text(json.dumps(config))
    fitted = fit_points(read_points(DATACOMP), Settings(points="all", bootstrap=0))
    (tmp_path / "fit.json").write_text(json.dumps(fitted))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_usage_errors_exit_2() -> None:
    for arguments in (
        ("fit", str(DATACOMP), "--bins", "2"),
        ("predict", "fit.json"),
        ("predict", "fit.json", "--samples", "1"),
        ("plots",),
    ):
        assert CliRunner().invoke(main, arguments).exit_code == 2
