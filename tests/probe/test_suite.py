"""A suite from end to end on digits: results that resume, the report, the comparison."""

import json
import os
import shutil
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import fingerprint_of
from clip_probe.averages import IMAGENET_SHIFTS, VTAB_PLUS, VTAB_PROBE, VTAB_ZEROSHOT, average
from clip_probe.compare import mcnemar
from clip_probe.predictions import read_predictions
from clip_probe.suite_config import read_suite
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from .conftest import invoke

Run = Callable[..., list[dict[str, Any]]]
Fail = Callable[..., str]
Digits = list[tuple[bytes, int]]
WriteSet = Callable[..., Path]
KillAt = Callable[[int, Callable[[], object]], bool]

SUITE = """
[models]
one = "one"
two = "two"

[probe]
shots = [1, 2]
seeds = 2

[[sets]]
path = "sets/digits"
probe = { val_split = "val" }

[[sets]]
path = "sets/shifted"
name = "turned"

[[sets]]
path = "sets/properties"

[averages]
both = ["digits", "turned"]

[robustness]
base = "digits"
shifted = ["turned"]
baseline = ["one", "two"]

[retrieval]
results = ["retrieval.jsonl"]
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    model_dir: Path,
    rows: Digits,
    write_set: WriteSet,
    properties: Path,
) -> Path:
    """Two models, three sets, the suite about them."""
    path = tmp_path_factory.mktemp("suite")
    shutil.copytree(model_dir, path / "one")
    shutil.copytree(model_dir, path / "two")
    weights = load_file(path / "two/open_clip_model.safetensors")
    noise = torch.randn(weights["visual.proj"].shape, generator=torch.Generator().manual_seed(0))
    weights["visual.proj"] += noise * weights["visual.proj"].std()
    save_file(weights, path / "two/open_clip_model.safetensors")
    splits = {"train": rows[:60], "val": rows[60:120], "test": rows[200:400]}
    write_set(path / "sets/digits", splits)
    turned = [(image, 9 - label) for image, label in rows[400:500]]
    write_set(path / "sets/shifted", {"test": turned})
    shutil.copytree(properties, path / "sets/properties")
    (path / "suite.toml").write_text(SUITE)
    metrics = {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@5": 0.5}
    line = {"task": "zeroshot_retrieval", "dataset": "x/captions", "model": "one", "images": 20}
    line |= {"captions": 40, "metrics": metrics, "fingerprint": fingerprint_of(path / "one")}
    other = {**line, "task": "zeroshot", "acc1": 0.5}  # of clip-probe: not read
    del other["metrics"]
    (path / "retrieval.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(other)}\n")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """What an uninterrupted run writes."""
    result = invoke("suite", folder / "suite.toml", folder / "whole")
    assert result.exit_code == 0, result.output
    return folder / "whole"


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def same_files(one: Path, other: Path) -> None:
    """All files but the cache's are equal, byte for byte."""
    names, others = (
        {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file() and "features" not in path.parts
        }
        for folder in (one, other)
    )
    assert names == others
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert {"results.jsonl", "report.html", "report.md"} <= {str(name) for name in names}


def test_lines_say_what_the_commands_say(run: Run, folder: Path, whole: Path) -> None:
    rows = read(whole)
    expected = [(m, s, "zeroshot") for m in ("one", "two") for s in ("digits", "turned")]
    keys = [(row["name"], row["set"], row["task"]) for row in rows]
    assert set(expected) < set(keys)
    assert keys[:4] == [
        ("one", "digits", "zeroshot"),
        ("one", "digits", "probe"),
        ("one", "turned", "zeroshot"),
        ("one", "properties", "zeroshot"),
    ]
    assert keys[-1] == ("one", "captions", "retrieval")
    for name, dataset in (("digits", "digits"), ("turned", "shifted"), ("properties",) * 2):
        (alone,) = run("zeroshot", folder / "two", folder / "sets" / dataset)
        row = next(row for row in rows if (row["name"], row["set"]) == ("two", name))
        assert {key: row[key] for key in alone} == json.loads(json.dumps(alone))
    options = ("--val-split", "val", "--shots", "1,2", "--seeds", 2)
    (probe,) = run("sweep", folder / "one", folder / "sets/digits", *options)
    row = next(row for row in rows if row["task"] == "probe" and row["name"] == "one")
    assert (row["full"], row["few_shot"]) == (probe["full"], probe["few_shot"])
    assert row["samples_seen"] is None  # the directory does not say
    assert row["parameters"] > 0


def test_run_again_there_is_nothing_to_do(run: Run, folder: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("[fdp]*/**/*")}
    (result,) = run("suite", folder / "suite.toml", whole)
    assert (result["new"], result["lines"]) == (0, 9)
    assert {path: path.stat().st_mtime_ns for path in whole.glob("[fdp]*/**/*")} == before


@pytest.mark.slow
def test_killed_anywhere_it_comes_out_the_same(
    folder: Path, whole: Path, kill_at: KillAt, run: Run
) -> None:
    """Killed again and again, each time a little further: the same files."""
    out = folder / "killed"
    for number in (1, 4, 11, 12, 15, 20):
        assert kill_at(number, lambda: invoke("suite", folder / "suite.toml", out))
        assert not (out / "report.md").exists()
    run("suite", folder / "suite.toml", out)
    same_files(whole, out)


def test_what_has_changed_is_done_again(
    run: Run, folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, folder / "changed")
    suite = folder / "changed.toml"
    suite.write_text(SUITE.replace("shots = [1, 2]", "shots = [1]"))
    monkeypatch.setattr("clip_probe.suite.zeroshot_head", None)  # no zero-shot line is
    shutil.rmtree(out / "probes")
    (result,) = run("suite", suite, out)
    assert result["new"] == 2
    monkeypatch.undo()
    templates = folder / "sets/digits/zeroshot_classification_templates.txt"
    before = templates.read_text()
    templates.write_text("{c}\n")
    (result,) = run("suite", suite, out)
    assert result["new"] == 4  # the probe's figures are beside the zero-shot head's
    zeroshot, probe = read(out)[:2]
    assert probe["zero_shot"]["acc1"] == zeroshot["acc1"]
    templates.write_text(before)
    suite.write_text(SUITE.replace('two = "two"\n', "").replace(', "two"]', "]"))
    suite.write_text(suite.read_text().replace('baseline = ["one"]\n', ""))
    run("suite", suite, out)
    assert {row["name"] for row in read(out)} == {"one"}


def test_the_report(whole: Path) -> None:
    text, page = (whole / "report.md").read_text(), (whole / "report.html").read_text()
    rows = {(row["name"], row["set"], row["task"]): row for row in read(whole)}
    one, two = (rows[name, "digits", "zeroshot"]["acc1"] for name in ("one", "two"))
    both = (one + rows["one", "turned", "zeroshot"]["acc1"]) / 2
    table = text.split("## Zero-shot classification, top-1\n")[1]
    line = next(line for line in table.splitlines() if line.startswith("| digits"))
    assert f"{100 * one:.1f} (" in line
    assert f"{100 * two:.1f} (" in line
    assert ("**" in line.split("|")[3]) == (one >= two)
    mean = next(line for line in table.splitlines() if line.startswith("| mean: both"))
    assert f"{100 * both:.1f}" in mean
    assert "Not all of their sets are here: VTAB+, zero-shot, lacks 35 of 35; VTAB, z" in text
    assert "; both, probe, lacks 1 of 2 (turned)." in text
    assert "| one | 25.0 | 50.0 |" in text
    precision = rows["one", "properties", "zeroshot"]["mean_average_precision"]
    assert f"{100 * precision:.1f} (" in text
    for name in ("zeroshot", "few_shot", "robustness"):
        assert f"({name}.png)" in text
    assert page.count("data:image/png;base64,") == 3
    assert 'src="http' not in page
    assert page.count("<table>") == page.count("</table>") == text.count("| --- |")


def p_of(row: dict[str, Any]) -> float:
    return row["p_value"]


def test_two_models_compared(run: Run, fail: Fail, folder: Path, whole: Path) -> None:
    models = ("--model-a", "one", "--model-b", "two")
    rows = {
        (row["set"], row["task"], row["metric"]): row
        for row in run("compare", whole, whole, *models)
    }
    row = rows["digits", "zeroshot", "acc1"]
    one, two = (
        read_predictions(whole / "details" / name / "digits/predictions.parquet")
        for name in ("one", "two")
    )
    right_one, right_two = (x["predicted"] == x["label"] for x in (one, two))
    only = int((right_one & ~right_two).sum()), int((~right_one & right_two).sum())
    assert (row["only_a_right"], row["only_b_right"]) == only
    assert row["p_value"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert row["difference"] == pytest.approx((only[1] - only[0]) / 200)
    spread = (right_two.astype(float) - right_one).std() / 200**0.5
    low, high = row["ci95"]
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)
    assert low <= row["difference"] <= high
    others = [r["p_value"] for r in rows.values() if r["task"] == "zeroshot" and "p_value" in r]
    assert len(others) == 2
    assert row["p_value_holm"] >= row["p_value"]
    least = min((r for r in rows.values() if r["task"] == "zeroshot" and "p_value" in r), key=p_of)
    assert least["p_value_holm"] == pytest.approx(min(1, 2 * min(others)))
    assert "p_value" in rows["digits", "probe", "acc1"]
    precision = rows["properties", "zeroshot", "mean_average_precision"]
    assert precision["ci95"][0] <= precision["difference"] <= precision["ci95"][1]
    assert ("digits", "zeroshot", "mean_per_class_recall") in rows

    (same, *_) = run("compare", whole, whole, "--model-a", "one", "--model-b", "one")
    assert (same["difference"], same["p_value"], same["ci95"]) == (0.0, 1.0, [0.0, 0.0])
    assert {row["a"] for row in run("compare", whole, whole)} == {"one", "two"}
    assert "no model 'three'" in fail("compare", whole, whole, "--model-a", "three")
    assert "no results at" in fail("compare", whole, folder)


def test_suites_of_other_images_cannot_be_compared(fail: Fail, folder: Path, whole: Path) -> None:
    other = shutil.copytree(whole, folder / "other-images")
    rows = read(other)
    rows[0]["digest"] = "0123"
    (other / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "digits: other images, labels or class names" in fail("compare", whole, other)
    (other / "results.jsonl").write_text("{\n")
    assert "not JSON Lines" in fail("compare", whole, other)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 3), (0, 5), (2, 9), (40, 60), (500, 400)])
def test_mcnemar_equals_the_sum_of_binomials(a: int, b: int) -> None:
    expected = 2 * sum(comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
    assert mcnemar(a, b) == pytest.approx(min(1, expected), rel=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[models]", "[modells]", "the file: 'modells' is unknown; known are models, sets"),
        ("[models]", "models = 3\n[x]", "'x' is unknown"),
        ('path = "sets/digits"', "", "[[sets]]: 'path' is missing"),
        ("shots = [1, 2]", "shot = [1]", "[probe]: 'shot' is unknown; known are train_split"),
        ('{ val_split = "val" }', '{ vals = "val" }', "probe: 'vals' is unknown"),
        ('name = "turned"', 'name = "digits"', "two sets are called 'digits'"),
        ('"digits", "turned"', '"digits", "cars"', "[averages] both: 'cars' is none of digits"),
        ('base = "digits"', 'base = "cars"', "[robustness]: 'cars' is none of digits, turned"),
        ('baseline = ["one"', 'baseline = ["un"', "[robustness]: 'un' is none of one, two"),
        ("shots = [1, 2]", "shots = 16", "shots 16: expected a list of whole numbers"),
        ("shots = [1, 2]", "shots = [1, 20]", "fewer than 20 shots: use --shots '1'"),
        ("seeds = 2", 'solver = "lbfsg"', "solver 'lbfsg' is none of lbfgs"),
        ("seeds = 2", 'feature = "prre"', "feature 'prre' is none of post"),
        ('path = "sets/digits"', "path = 3", "[[sets]] path: expected text, found 3"),
        ('["digits", "turned"]', "[]", "[averages] both: expected a list of names, found []"),
        ('shifted = ["turned"]', "shifted = []", "[robustness] shifted: expected a list of names"),
        ('one = "one"', "one = 1", "[models] one: expected text, found 1"),
        ('["retrieval.jsonl"]', '"retrieval.jsonl"', "[retrieval] results: expected a list"),
        ('one = "one"', 'one = "uno"', "uno is not a model directory"),
        ('"sets/shifted"', '"sets/none"', "no labelled set at"),
        ('val_split = "val"', 'val_split = "dev"', "no split 'dev'"),
        ('path = "sets/properties"', 'path = "sets/properties"\nprobe = true', "multi-label set"),
        ("retrieval.jsonl", "suite.toml", "not JSON Lines"),
        ("[models]", "[models", "is no TOML"),
    ],
)
def test_faults_in_the_file(
    fail: Fail, folder: Path, whole: Path, old: str, new: str, says: str
) -> None:
    assert old in SUITE
    file = folder / "fault.toml"
    file.write_text(SUITE.replace(old, new, 1))
    assert says in fail("suite", file, whole)


def test_no_file_and_others(fail: Fail, folder: Path, tmp_path: Path) -> None:
    assert "no suite at" in fail("suite", tmp_path / "none.toml", tmp_path / "out")
    assert "no suite at" in fail("suite", tmp_path, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    assert "is no TOML" in fail("suite", tmp_path / "latin.toml", tmp_path / "out")
    for line in ({"task": "zeroshot_retrieval", "model": "one", "metrics": {}}, {"task": "eval"}):
        (folder / "no.jsonl").write_text(json.dumps(line) + "\n")
        file = folder / "no.toml"
        file.write_text(SUITE.replace("retrieval.jsonl", "no.jsonl"))
        assert "expected lines of `clip-retrieval eval`" in fail("suite", file, tmp_path / "out")


def test_probes_take_the_texts_of_the_suite(
    run: Run, folder: Path, tmp_path: Path, write_set: WriteSet, rows: Digits
) -> None:
    """As zero-shot heads do; the set has none of its own."""
    path = write_set(tmp_path / "plain", {"train": rows[:60], "test": rows[200:300]})
    for name in ("classnames", "zeroshot_classification_templates"):
        (path / f"{name}.txt").rename(tmp_path / f"{name}.txt")
    (tmp_path / "suite.toml").write_text(
        f"""
        [models]
        one = "{folder / "one"}"
        [[sets]]
        path = "plain"
        classnames = "classnames.txt"
        templates = "zeroshot_classification_templates.txt"
        probe = {{ shots = [] }}
        """
    )
    run("suite", tmp_path / "suite.toml", tmp_path / "out")
    zeroshot, probe = read(tmp_path / "out")
    assert probe["zero_shot"]["acc1"] == zeroshot["acc1"]
    assert probe["templates_hash"] == zeroshot["templates_hash"]


def test_a_set_of_the_hub_has_clip_benchmarks_name(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    sets = "".join(f'[[sets]]\npath = "{p}"\n' for p in ("wds/vtab/dtd", "wds/cars", "x/pets"))
    file.write_text(f'[models]\nm = "m"\n{sets}')
    assert [one.name for one in read_suite(file, []).sets] == ["vtab/dtd", "cars", "pets"]


def test_averages_are_the_papers() -> None:
    """35 sets in VTAB+, 19 in either VTAB, 5 shifts of ImageNet; a mean of all or none."""
    assert len(set(VTAB_PLUS)) == len(VTAB_PLUS) == 35
    assert len(set(VTAB_ZEROSHOT)) == len(set(VTAB_PROBE)) == 19
    assert set(VTAB_ZEROSHOT) - set(VTAB_PROBE) == {"sun397"}
    assert set(VTAB_PROBE) - set(VTAB_ZEROSHOT) == {"vtab/cifar10"}
    assert {*VTAB_ZEROSHOT, *VTAB_PROBE, *IMAGENET_SHIFTS} < set(VTAB_PLUS)
    assert "voc2007_multilabel" not in VTAB_PLUS
    scores = dict.fromkeys(IMAGENET_SHIFTS, 0.5)
    assert average(scores, IMAGENET_SHIFTS) == 0.5
    assert average(scores, VTAB_PLUS) is None
