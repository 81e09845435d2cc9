"""`zeroshot` and `eval` equal open_clip on the same directory; what does not fit is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_models import Head, build_head, load_model, save_head
from clip_probe.features import encode
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score

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
    assert row["mean_per_class_recall"] == pytest.approx(expected, abs=1e-15)
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
