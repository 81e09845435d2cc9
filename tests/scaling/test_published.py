"""The paper's figures give the paper's laws, and its models the paper's sizes."""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
from architectures import model_config, profile, published
from check import check
from clip_models.architectures import architecture, architecture_names
from clip_models.profiles import profile as profile_of_tool
from fits import NO_LAW, describe, hold_out
from frontier import frontier
from law import laws
from points import read_points
from settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_every_printed_figure_is_met(published: Path) -> None:
    rows = check(published)
    assert [row["what"] for row in rows if not row["ok"]] == []
    kinds = [re.search(r"exponent|prefactor|sum| at ", row["what"]) for row in rows]
    count = {
        k: sum(m is not None and m.group() == k for m in kinds)
        for k in ("exponent", "prefactor", " at ")
    }
    assert count == {"exponent": 22, "prefactor": 22, " at ": 20}


@pytest.mark.parametrize(
    ("quantity", "group", "rule", "prefactor", "exponent"),
    [  # to more decimals than are printed, from the unrounded figures
        ("imagenet1k", "openclip", "binned", 5.858, -0.1114),
        ("imagenet1k", "openai", "all", 23.184, -0.1638),
        ("imagenet_robustness", "openclip", "binned", 11.609, -0.1255),
        ("imagenet_robustness", "openai", "all", 211.66, -0.2378),
        ("coco_image_recall@5", "openclip", "binned", 2.750, -0.0794),
        ("coco_image_recall@5", "openai", "all", 1.589, -0.0508),
        ("flickr30k_image_recall@5", "openclip", "binned", 15.506, -0.1892),
        ("flickr30k_image_recall@5", "openai", "all", 2.208, -0.1028),
        ("vtab+", "openclip", "binned", 1.562, -0.0436),
        ("vtab+", "openai", "all", 5.557, -0.0908),
        ("coco_text_recall@5", "openclip", "binned", 2.850, -0.102),
        ("flickr30k_text_recall@5", "openclip", "binned", 569.9, -0.382),
    ],
)
def test_laws_to_more_decimals(
    published: Path, quantity: str, group: str, rule: str, prefactor: float, exponent: float
) -> None:
    points = [
        p
        for p in read_points(published / "zero_shot.csv", [quantity], percent=True)
        if p.group == group and p.quantity == quantity
    ]
    (law,) = laws(points, Settings(points=rule))
    assert law.line is not None
    assert law.line[1] == pytest.approx(exponent, abs=0.0005)
    assert 10 ** law.line[0] == pytest.approx(prefactor, rel=0.01)


def imagenet(published: Path, **settings: object):
    points = read_points(published / "zero_shot.csv", ["imagenet1k"], percent=True)
    chosen = Settings(**settings)
    return next(law for law in laws(points, chosen) if law.group == "openclip")


@pytest.mark.parametrize(
    ("settings", "exponent"),
    [
        ({"points": "pareto"}, -0.1110),
        ({"points": "all"}, -0.1012),
        ({"points": "binned", "edge": 0.0}, -0.1157),
    ],
)
def test_other_choices_of_points(
    published: Path, settings: dict[str, object], exponent: float
) -> None:
    line = imagenet(published, **settings).line
    assert line is not None
    assert line[1] == pytest.approx(exponent, abs=0.0005)


def test_the_interval_of_the_papers_exponent(published: Path) -> None:
    """Near -0.138 to -0.088, plain percentiles of 2,000 resamplings found beforehand."""
    about = describe(imagenet(published, points="binned"))
    low, high = about["interval_95"]["exponent"]
    assert -0.147 < low < -0.132
    assert -0.093 < high < -0.082
    assert about["verdict"] == "power law"


def test_the_two_largest_runs_are_foretold(published: Path) -> None:
    found = hold_out(imagenet(published, points="binned"), 2)
    held = {row["run"].split()[0]: row for row in found or []}
    assert 1 - held["ViT-H-14"]["error"] == pytest.approx(0.7806, abs=0.0002)
    assert 1 - held["ViT-g-14"]["error"] == pytest.approx(0.7656, abs=0.0002)


def test_three_openai_runs_allow_no_verdict(published: Path) -> None:
    points = read_points(published / "zero_shot.csv", ["imagenet1k"], percent=True)
    openai = next(law for law in laws(points, Settings(points="binned")) if law.group == "openai")
    about = describe(openai)
    assert about["rule"] == "all"  # no bins for three runs
    assert about["exponent"] == pytest.approx(-0.1638, abs=0.0005)
    assert about["interval_95"] is None
    assert about["verdict"] not in (NO_LAW, "power law")


def test_small_data_is_the_bottleneck(published: Path) -> None:
    points = read_points(published / "zero_shot.csv", ["imagenet1k"], percent=True)
    openclip = next(g for g in frontier(points, 0.004) if g["group"] == "openclip")
    assert len(openclip["frontier"]) == 10
    small = [row for row in openclip["off"] if "LAION-80M" in row["run"]]
    assert len(small) >= 7
    assert all("data" in row["limits"] for row in small)


@pytest.mark.parametrize(
    "table",
    ["zero_shot.csv", "linear_probe.csv", "predictions.csv", "laws.csv", "architectures.csv"],
)
@pytest.mark.parametrize("place", [0, -1])
def test_a_figure_that_was_tampered_with_is_noticed(
    run: Run, published: Path, tmp_path: Path, table: str, place: int
) -> None:
    shutil.copytree(published, tmp_path / "tables")
    file = tmp_path / "tables" / table
    rows = list(csv.reader(file.open()))
    row = rows[1 if place == 0 else -1]
    if table == "architectures.csv":
        row = next(row for row in rows if row[0] == ("ViT-B-32" if place == 0 else "ViT-G-14"))
    columns = {"predictions.csv": 3, "architectures.csv": 9}
    column = columns.get(table, 4 if place == 0 else len(row) - 1)
    row[column] = f"{float(row[column]) * 0.9:.4f}"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    result = run("check", "--tables", tmp_path / "tables")
    assert result.returncode == 1
    assert "MISS" in result.stdout
    assert "missed" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_passes_as_it_comes(run: Run) -> None:
    result = run("check", "--format", "json")
    assert result.returncode == 0, result.stderr
    assert all(json.loads(line)["ok"] for line in result.stdout.splitlines())


# The paper's name: open_clip's, and what it is at another size
OTHER_NAMES = {"ViT-G-14": "ViT-bigG-14"}


def test_the_closed_form_gives_the_papers_sizes() -> None:
    """Every vision transformer of the table, from open_clip's own configuration of it."""
    assert len(published()) == 24
    for name, row in published().items():
        base = name.removesuffix("-336") if name != "ViT-L-14-336" else name
        config = open_clip.get_model_config(OTHER_NAMES.get(base, base))
        assert config is not None, name
        config["vision_cfg"]["image_size"] = int(row["image_size"])
        for found in (profile(config), profile(model_config(name))):
            assert found["gmacs"] == pytest.approx(float(row["gmacs"]), rel=0.003), name
            assert found["parameters"] / 1e6 == pytest.approx(float(row["mparams"]), abs=0.015)


def test_the_tool_for_models_agrees() -> None:
    """The fits import none of the tools; clip-models computes the same on its own."""
    for name in architecture_names():
        config = architecture(name)
        theirs, ours = profile_of_tool(config), profile(config.to_dict())
        assert theirs["parameters"] == ours["parameters"], name
        assert theirs["gmacs"] == pytest.approx(ours["gmacs"], abs=5.1e-5), name


@pytest.mark.parametrize("name", [n for n in architecture_names() if n.startswith("ViT-")])
def test_models_list_gives_the_papers_sizes(name: str) -> None:
    plain = re.sub("-(quickgelu|siglip)$", "", name).replace("bigG", "G")
    row, found = published()[plain], profile_of_tool(architecture(name))
    assert found["gmacs"] == pytest.approx(float(row["gmacs"]), rel=0.003)
    assert found["parameters"] / 1e6 == pytest.approx(float(row["mparams"]), abs=0.015)
