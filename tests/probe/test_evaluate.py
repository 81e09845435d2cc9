"""`zeroshot` and `eval` equal open_clip on the same directory; what does not fit is refused."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_models import Head, build_head, load_model, read_templates, save_head
from clip_probe.datasets import open_split
from clip_probe.features import encode
from clip_probe.predictions import read_predictions
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    precision_score,
    recall_score,
)

from .conftest import NAMES
from .test_metrics import benchmark_average_precisions

Run = Callable[..., list[dict[str, Any]]]
Fail = Callable[..., str]
Digits = list[tuple[bytes, int]]
WriteSet = Callable[..., Path]


@pytest.fixture
def changed(tmp_path: Path, digits: Path) -> Path:
    """A copy of the digits to be spoilt."""
    return shutil.copytree(digits, tmp_path / "changed")


@pytest.fixture
def model(tmp_path: Path, model_dir: Path) -> Path:
    """A copy of the model, for heads to be saved in."""
    return shutil.copytree(model_dir, tmp_path / "model")


def benchmark_accuracy(output: torch.Tensor, target: torch.Tensor, k: int) -> float:
    """CLIP_benchmark's definition (metrics/zeroshot_classification.py)."""
    pred = output.topk(5, 1, True, True)[1].t()
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    return float(correct[:k].reshape(-1).float().sum(0, keepdim=True).numpy()[0]) / len(target)


def test_zeroshot_equals_open_clip(
    run: Run, model_dir: Path, digits: Path, rows: Digits, tmp_path: Path
) -> None:
    (row,) = run("zeroshot", model_dir, digits)
    name = f"local-dir:{model_dir}"
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    theirs.eval()
    names = (digits / "classnames.txt").read_text().splitlines()
    templates = (digits / "zeroshot_classification_templates.txt").read_text().splitlines()
    folder = tmp_path / "images"
    folder.mkdir()
    images = []
    for i, (data, _) in enumerate(rows[400:800]):
        (folder / f"{i}.png").write_bytes(data)
        images.append(transform(Image.open(folder / f"{i}.png")))
    target = torch.tensor([label for _, label in rows[400:800]])
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            theirs,
            open_clip.get_tokenizer(name),
            names,
            [lambda c, t=t: t.format(c=c) for t in templates],
            device="cpu",
        )
        logits = 100.0 * F.normalize(theirs.encode_image(torch.stack(images)), dim=-1) @ classifier
    assert row["acc1"] == benchmark_accuracy(logits, target, 1)
    assert row["acc5"] == benchmark_accuracy(logits, target, 5)
    expected = balanced_accuracy_score(target, logits.argmax(1))
    assert row["mean_per_class_recall"] == expected
    assert (row["samples"], row["failed"], row["classes"]) == (400, 0, 10)
    assert row["acc1_ci95"][0] < row["acc1"] < row["acc1_ci95"][1]


def test_one_line_per_set_and_loader_workers_change_nothing(
    run: Run, model_dir: Path, digits: Path
) -> None:
    first, second = run("zeroshot", model_dir, digits, digits, "--split", "val")
    assert first == second
    (parallel,) = run("zeroshot", model_dir, digits, "--split", "val", "--workers", 2)
    assert parallel == first


def test_other_templates(
    run: Run, fail: Fail, model_dir: Path, digits: Path, tmp_path: Path
) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("{c}\n")
    (own,) = run("zeroshot", model_dir, digits)
    (other,) = run("zeroshot", model_dir, digits, "--templates", templates)
    assert other["templates_hash"] != own["templates_hash"]
    templates.write_text("a number\n")
    assert "'a number' has no {c}" in fail("zeroshot", model_dir, digits, "--templates", templates)


def test_an_empty_class_name_is_a_class_and_duplicates_are_evaluated(
    run: Run, model_dir: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    names = ["zero", "", "two", "three", "four", "five", "six", "seven", "two", "nine"]
    path = write_set(tmp_path / "set", {"test": rows[:100]}, names)
    (row,) = run("zeroshot", model_dir, path)  # ImageNet's names hold duplicates too
    assert (row["classes"], row["classes_present"]) == (10, 10)


def test_corrupt_images_are_counted_and_more_than_a_twentieth_stop(
    run: Run, fail: Fail, model_dir: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    bad = [(b"not an image", label) for _, label in rows]
    good = rows[10:210]
    path = write_set(tmp_path / "some", {"test": [*bad[:10], *good]})
    (row,) = run("zeroshot", model_dir, path, "--batch-size", 4)
    assert (row["samples"], row["failed"]) == (200, 10)
    (clean,) = run("zeroshot", model_dir, write_set(tmp_path / "none", {"test": good}))
    assert row["acc1"] == clean["acc1"]
    line = fail("zeroshot", model_dir, write_set(tmp_path / "many", {"test": [*bad[:11], *good]}))
    assert "cannot be decoded" in line
    assert "limit 5%" in line
    assert "s0000000" in line


def test_features_that_are_not_numbers(fail: Fail, model: Path, digits: Path) -> None:
    file = model / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, file)
    line = fail("zeroshot", model, digits)
    assert "image 's0000000'" in line
    assert "not finite" in line
    assert str(model) in line


def test_missing_model_and_split(fail: Fail, model_dir: Path, digits: Path, tmp_path: Path) -> None:
    assert "nowhere" in fail("zeroshot", tmp_path / "nowhere", digits)
    if not torch.cuda.is_available():
        assert "use --device cpu" in fail("zeroshot", model_dir, digits, "--device", "cuda")
    line = fail("zeroshot", model_dir, digits, "--split", "dev")
    assert "no split 'dev'" in line
    assert "test, train, val" in line


def test_eval_of_a_zero_shot_head_equals_zeroshot(run: Run, model: Path, digits: Path) -> None:
    loaded = load_model(model)
    (expected,) = run("zeroshot", model, digits)
    names = expected_names = (digits / "classnames.txt").read_text().splitlines()
    templates = (digits / "zeroshot_classification_templates.txt").read_text().splitlines()
    save_head(model, "zs", build_head(loaded, names, templates))
    save_head(model, "mixed", build_head(loaded, expected_names[::-1], templates))
    one, other = run("eval", model, digits, "--head", "zs", "--head", "mixed")
    for key in ("acc1", "acc5", "mean_per_class_recall", "samples", "templates_hash"):
        assert one[key] == other[key] == expected[key]
    assert (one["head"], one["kind"], one["feature"]) == ("zs", "zero-shot", "post")


def test_heads_on_either_feature_share_the_decoding(
    run: Run, model: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(model)
    names = tuple((digits / "classnames.txt").read_text().splitlines())
    for kind, width in (("post", 32), ("pre", 64)):
        weight = torch.randn(10, width, generator=torch.Generator().manual_seed(0))
        head = Head(weight, torch.zeros(10), names, "probe", kind, loaded.fingerprint)
        save_head(model, kind, head)
    calls: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return encode(*args, **kwargs)

    monkeypatch.setattr("clip_probe.evaluate.encode", counted)
    lines = run("eval", model, digits, "--head", "post", "--head", "pre", "--split", "val")
    assert [line["feature"] for line in lines] == ["post", "pre"]
    assert len(calls) == 1


def test_a_head_with_more_classes_than_the_set(
    run: Run, model: Path, digits: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    """As ImageNet's head on the 200 classes of ImageNet-R: the others cannot be named."""
    names = (digits / "classnames.txt").read_text().splitlines()
    save_head(model, "all", build_head(load_model(model), names, ["{c}"]))
    few = [(image, 4 - label) for image, label in rows[:300] if label < 5]
    path = write_set(tmp_path / "few", {"test": few}, names[4::-1], ("{c}",))
    (zeroshot,) = run("zeroshot", model, path)
    (row,) = run("eval", model, path, "--head", "all")
    for key in ("acc1", "acc5", "mean_per_class_recall", "ece"):
        assert row[key] == zeroshot[key]
    assert row["classes"] == 5


def test_heads_that_do_not_fit(
    fail: Fail, run: Run, model: Path, digits: Path, changed: Path
) -> None:
    loaded = load_model(model)

    def save(name: str, names: list[str]) -> None:
        save_head(model, name, build_head(loaded, names, ["{c}"], allow_duplicates=True))

    names = (digits / "classnames.txt").read_text().splitlines()
    save("words", names)
    save("numbers", [*names[:9], "9"])
    line = fail("eval", model, digits, "--head", "words", "--head", "numbers")
    assert "'numbers' does not fit" in line
    assert "['9']" in line
    assert "['nine']" in line
    assert "no head 'none'" in fail("eval", model, digits, "--head", "none")

    twice = [*names[:9], "zero"]
    save("twice", twice)
    save("twice-mixed", twice[::-1])
    (changed / "classnames.txt").write_text("\n".join(twice) + "\n")
    run("eval", model, changed, "--head", "twice")  # the same names in the same order
    assert "a class name twice" in fail("eval", model, changed, "--head", "twice-mixed")


def test_many_labels_equal_clip_benchmark(
    run: Run, model_dir: Path, properties: Path, tmp_path: Path
) -> None:
    """mAP by its formula (test_metrics) from open_clip's logits; the table by class."""
    output = ("--output", tmp_path, "--save-predictions")
    (row,) = run("zeroshot", model_dir, properties, *output)
    split = open_split(properties, "test", multilabel=True)
    name = f"local-dir:{model_dir}"
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    theirs.eval()
    images = [transform(Image.open(io.BytesIO(split.read(n)))) for n in range(200)]
    truth = torch.zeros(200, 5, dtype=torch.int64)
    for n, sample in enumerate(split.samples):
        truth[n, list(sample.labels)] = 1
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            theirs,
            open_clip.get_tokenizer(name),
            split.class_names,
            [lambda c: f'a photo of the number: "{c}".', lambda c: f"a drawing of {c}."],
            device="cpu",
        )
        logits = 100.0 * F.normalize(theirs.encode_image(torch.stack(images)), dim=-1) @ classifier
    expected = benchmark_average_precisions(logits, truth)
    assert row["mean_average_precision"] == expected.mean().item()
    assert "acc1" not in row
    with (tmp_path / "properties/per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["average_precision"]) for line in table] == expected.tolist()
    assert [int(line["positives"]) for line in table] == truth.sum(0).tolist()
    saved = read_predictions(tmp_path / "properties/predictions.parquet")
    assert [tuple(labels) for labels in saved["labels"]] == [s.labels for s in split.samples]
    assert torch.allclose(
        torch.tensor(np.stack(saved["scores"])), logits / 100 * 14.2857, atol=1e-3
    )


def test_details_of_a_set(
    run: Run,
    fail: Fail,
    model: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    output = ("--output", out, "--save-predictions")
    (row,) = run("zeroshot", model, digits, *output)
    with monkeypatch.context() as patch:  # a hub's snapshot goes by the set's name
        patch.setattr("clip_probe.datasets.fetch_split", lambda *_: digits)
        (hub,) = run("zeroshot", model, "wds/vtab/one", *output)
    assert json.loads((out / "one/result.json").read_text()) == hub
    assert json.loads((out / "digits/result.json").read_text()) == row
    saved = read_predictions(out / "digits/predictions.parquet")
    labels, predicted = saved["label"], saved["predicted"]
    assert (labels == predicted).mean() == row["acc1"]
    assert [row[0] for row in saved["best"]] == predicted.tolist()
    assert saved["label_name"][0] == NAMES[labels[0]]
    assert saved["key"][:2].tolist() == ["s0000000", "s0000002"]  # in shard order
    assert saved["confidence"].min() >= 0.1
    expected = confusion_matrix(labels, predicted, labels=range(10))
    with (out / "digits/confusion.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == ["label", *NAMES]
    assert [[int(n) for n in line[1:]] for line in lines] == expected.tolist()
    with (out / "digits/per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    recalls = recall_score(labels, predicted, average=None)
    assert [float(line["recall"]) for line in table] == pytest.approx(recalls.tolist())
    precisions = precision_score(labels, predicted, average=None, zero_division=0)
    assert [float(line["precision"] or 0) for line in table] == pytest.approx(precisions.tolist())
    off_diagonal = expected - np.diag(np.diag(expected))
    assert [int(line["confused"]) for line in table] == off_diagonal.max(1).tolist()
    for name in ("confusion", "reliability"):
        assert Image.open(out / f"digits/{name}.png").format == "PNG"

    save_head(model, "zs", build_head(load_model(model), NAMES, read_templates(digits)))
    (other,) = run("eval", model, digits, "--head", "zs", *output)
    assert json.loads((out / "digits/zs/result.json").read_text()) == other
    again = read_predictions(out / "digits/zs/predictions.parquet")
    assert again["predicted"].tolist() == predicted.tolist()

    assert "give --output too" in fail("zeroshot", model, digits, "--save-predictions")
    assert "two sets would share" in fail("zeroshot", model, digits, digits, "--output", out)


def test_class_names_of_another_language(
    run: Run, fail: Fail, model_dir: Path, digits: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("null\neins\nzwei\ndrei\nvier\nfünf\nsechs\nsieben\nacht\n\n")
    (own,) = run("zeroshot", model_dir, digits)
    (other,) = run("zeroshot", model_dir, digits, "--classnames", names)
    assert other["classes"] == 10  # the last one's name is empty
    assert other["digest"] != own["digest"]
    (named,) = run("zeroshot", model_dir, digits, "--templates", "simple-imagenet")
    assert named["templates_hash"] != own["templates_hash"]
    names.write_text("null\n")
    assert "beyond the 1 class names" in fail("zeroshot", model_dir, digits, "--classnames", names)
