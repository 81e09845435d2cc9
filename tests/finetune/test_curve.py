import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_finetune import (
    CurveConfig,
    FinetuneError,
    interpolate_models,
    measure_curve,
    open_set,
    train,
)
from clip_finetune.choice import Scores, choose, wilson
from clip_models import build_head, load_head, load_model, save_head
from PIL import Image
from scipy.stats import binomtest

from .conftest import NAMES, config, digits, write_set

ALPHAS = (0.0, 0.25, 0.5, 1.0)


def curve_config(digits_set: Path, *ood: Path, **changes: object) -> CurveConfig:
    settings = {"id": (digits_set,), "ood": ood, "alphas": "0,0.25,0.5,1", "workers": 0}
    return CurveConfig(**(settings | changes))


def evaluate(model: Path, data: Path, split: str, head: str = "") -> float:
    """One directory on one split."""
    loaded, samples = load_model(model), open_set(data, split)
    made = build_head(loaded, samples.class_names, samples.templates)
    if head:
        made = load_head(model, head)
    images = torch.stack([loaded.preprocess.eval(samples.read(row)) for row in range(len(samples))])
    with torch.no_grad():
        features = loaded.model.encode_image(loaded.preprocess.normalize(images))
        logits_NC = made.logits(features)
    columns = [made.class_names.index(name) for name in samples.class_names]
    hits = int((logits_NC[:, columns].argmax(1).numpy() == samples.label_N).sum())
    return hits / len(samples)


def test_equals_interpolated_directories(base, finetuned, digits_set, inverted_set, tmp_path: Path):
    settings = curve_config(digits_set, inverted_set, rule="best-mean")
    result = measure_curve(base, finetuned, tmp_path / "curve", settings)
    for alpha, point in zip(ALPHAS, result["points"], strict=True):
        model = tmp_path / f"at-{alpha}"
        interpolate_models(base, finetuned, model, alpha)
        for data in (digits_set, inverted_set):
            for key, split in (("test", "test"), ("validation", "val")):
                got = point[key]["sets"][data.name]["accuracy"]
                assert got == pytest.approx(evaluate(model, data, split)), (alpha, data, split)
        test = point["test"]
        assert test["mean"] == pytest.approx((test["id"] + test["ood"]) / 2)
        assert test["mean_interval"][0] < test["mean"] < test["mean_interval"][1]
    best = max(point["validation"]["mean"] for point in result["points"])
    assert result["chosen"]["validation"]["mean"] == best
    for alpha in (0, 1):
        end = next(point for point in result["points"] if point["alpha"] == alpha)
        gain = result["chosen"]["test"]["mean"] - end["test"]["mean"]
        assert result["chosen"]["gains"][f"over alpha {alpha}"]["gain"] == pytest.approx(gain)
    assert json.loads((tmp_path / "curve/curve.json").read_text()) == result
    assert (tmp_path / "curve/curve.png").read_bytes()[:4] == b"\x89PNG"
    assert measure_curve(base, finetuned, tmp_path / "curve", settings) == result
    fixed = curve_config(digits_set, inverted_set, rule="fixed")
    with pytest.raises(FinetuneError, match=r"another run's \(rule is best-mean there, fixed here"):
        measure_curve(base, finetuned, tmp_path / "curve", fixed)


def test_every_image_once_whatever_the_chunk(
    base, finetuned, digits_set, inverted_set, tmp_path, monkeypatch
):
    """Small chunks, each set's rest beside the next set's start: the same figures."""
    settings = curve_config(digits_set, inverted_set)
    whole = measure_curve(base, finetuned, tmp_path / "whole", settings)
    reads: list[tuple[Path, int]] = []
    read = type(open_set(digits_set, "test")).read
    monkeypatch.setattr("clip_finetune.scoring._CHUNK", 25)
    monkeypatch.setattr(
        "clip_finetune.labelled_set.LabelledSet.read",
        lambda self, row: reads.append((self.path / self.split, row)) or read(self, row),
    )
    settings = curve_config(digits_set, inverted_set, batch_size=11)
    parts = measure_curve(base, finetuned, tmp_path / "parts", settings)
    assert parts == whole
    assert len(reads) == len(set(reads)) == 60 + 50 + 60  # four alphas, one read


def relabelled(tmp_path: Path, name: str, splits: dict[str, list[int]], images: list[bytes]):
    """A set of these images whose labels are given."""
    samples = {split: list(zip(images, labels, strict=True)) for split, labels in splits.items()}
    return write_set(tmp_path / name, samples, shards=1)


@pytest.fixture
def answered(base: Path, finetuned: Path, tmp_path: Path):
    """40 images, and what the model half-way says of each."""
    images = [image for image, _ in digits(0, 40)]
    draft = relabelled(tmp_path, "draft", {"val": [0] * 40}, images)
    interpolate_models(base, finetuned, tmp_path / "half", 0.5)
    loaded, data = load_model(tmp_path / "half"), open_set(draft, "val")
    head = build_head(loaded, data.class_names, data.templates)
    batch = torch.stack([loaded.preprocess.eval(data.read(row)) for row in range(40)])
    with torch.no_grad():
        answers = head.logits(loaded.model.encode_image(loaded.preprocess.normalize(batch)))
    return images, answers.argmax(dim=1).tolist()


def test_alpha_is_chosen_on_validation(base, finetuned, answered, tmp_path: Path):
    """Validation labels that agree with one alpha, whatever test says."""
    images, labels = answered
    wrong = [(label + 1) % 10 for label in labels]
    id_set = relabelled(tmp_path, "id", {"val": labels, "test": wrong}, images)
    ood = write_set(tmp_path / "ood", {"test": digits(50, 20)})
    result = measure_curve(base, finetuned, tmp_path / "curve", curve_config(id_set, ood))
    assert result["chosen"]["validation"]["id"] == 1.0
    first = min(p["alpha"] for p in result["points"] if p["validation"]["id"] == 1.0)
    assert result["chosen"]["alpha"] == first
    fixed = curve_config(id_set, ood, rule="fixed")
    result = measure_curve(base, finetuned, tmp_path / "fixed", fixed)
    assert result["chosen"]["alpha"] == 0.5
    assert result["chosen"]["validation"] == {"sets": {}}
    mean = curve_config(id_set, ood, rule="best-mean")
    with pytest.raises(FinetuneError, match="no split 'val'"):
        measure_curve(base, finetuned, tmp_path / "mean", mean)


def test_control_loses_at_most_a_point():
    """Patching's rule: the best mean of the tasks among alphas that keep every control set."""

    def point(alpha: float, task: float, **controls: float) -> dict[str, object]:
        sets = {name: {"accuracy": share} for name, share in controls.items()}
        return {"alpha": alpha, "validation": {"id": task, "sets": sets}}

    points = [
        point(0, 0.2, a=0.80, b=0.5),
        point(0.1, 0.5, a=0.79, b=0.6),
        point(0.2, 0.6, a=0.795, b=0.4899),
        point(0.3, 0.7, a=0.79, b=0.49),
        point(1, 0.9, a=0.60, b=0.7),
    ]

    def chosen(**options: object) -> float:
        settings = {"id": (Path("t"),), "control": (Path("a"), Path("b"))}
        return choose(points, CurveConfig(**(settings | options)))["alpha"]

    assert chosen() == 0.3
    assert chosen(control=(Path("a"),)) == 0.3
    assert chosen(max_loss=0.0) == 0
    assert chosen(max_loss=50.0) == 1


def test_control_set_of_other_classes(base, finetuned, digits_set, tmp_path: Path):
    """It is scored by its own head on validation and test, and drawn where there is no OOD."""
    control = write_set(
        tmp_path / "parity",
        {
            "val": [(i, n % 2) for i, n in digits(0, 40)],
            "test": [(i, n % 2) for i, n in digits(50, 30)],
        },
        names=["even", "odd"],
    )
    settings = curve_config(digits_set, control=(control,))
    result = measure_curve(base, finetuned, tmp_path / "curve", settings)
    interpolate_models(base, finetuned, tmp_path / "half", 0.5)
    half = result["points"][2]
    assert half["test"]["sets"]["parity"]["accuracy"] == evaluate(
        tmp_path / "half", control, "test"
    )
    assert half["test"]["control"] == half["test"]["sets"]["parity"]["accuracy"]
    assert set(half["validation"]["sets"]) == {"digits", "parity"}
    assert "ood" not in half["test"]
    assert "gains" not in half
    assert (tmp_path / "curve/curve.png").is_file()


@pytest.fixture(scope="module")
def with_head(base: Path, digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a trained head."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(base, out, config(digits_set, method="end-to-end", iterations=30, lr=3e-3))
    return out


def test_trained_head_scores_subsets_and_permutations(
    base, with_head, digits_set, inverted_set, tmp_path: Path
):
    """OOD sets with some of the head's classes, in another order: by name, as WiSE-FT's."""
    kept = [7, 2, 0]
    few = write_set(
        tmp_path / "few",
        {"test": [(image, kept.index(n)) for image, n in digits(100, 200) if n in kept]},
        names=[NAMES[n] for n in kept],
    )
    settings = curve_config(digits_set, inverted_set, few)
    result = measure_curve(base, with_head, tmp_path / "curve", settings)
    assert result["heads"] == dict.fromkeys(("digits", "inverted", "few"), "fine-tuned")
    for alpha, point in zip(ALPHAS, result["points"], strict=True):
        model = tmp_path / f"at-{alpha}"
        interpolate_models(base, with_head, model, alpha)
        for data in (digits_set, inverted_set, few):
            expected = evaluate(model, data, "test", head="digits")
            assert point["test"]["sets"][data.name]["accuracy"] == pytest.approx(expected)


def test_classes_that_do_not_match(base, with_head, digits_set, tmp_path: Path):
    other = write_set(tmp_path / "other", {"test": digits(0, 20)}, names=[*NAMES[:9], "Nine"])
    with pytest.raises(FinetuneError, match=r"'digits' for .*other: 1 of 10 .* first 'Nine'"):
        measure_curve(base, with_head, tmp_path / "c", curve_config(digits_set, other))
    # a control set may have classes of its own
    settings = curve_config(digits_set, control=(other,), rule="fixed")
    assert measure_curve(base, with_head, tmp_path / "d", settings)["heads"]["other"] == "zero-shot"
    two = two_heads(base, digits_set, tmp_path)
    settings = curve_config(digits_set, same_classes(tmp_path))
    with pytest.raises(FinetuneError, match="have its classes; say which one with --head"):
        measure_curve(base, two, tmp_path / "c", settings)
    assert not (tmp_path / "c").exists()


def same_classes(tmp_path: Path) -> Path:
    link = tmp_path / "elsewhere"
    write_set(link, {"test": digits(0, 20)})
    return link


def two_heads(base: Path, digits_set: Path, tmp_path: Path) -> Path:
    """Two trained heads of the same classes."""
    second = write_set(tmp_path / "second", {"train": digits(400, 100)})
    out = tmp_path / "two"
    train(base, out, config(digits_set, second, method="end-to-end"))
    return out


def test_asked_head(base, digits_set, tmp_path: Path):
    two = two_heads(base, digits_set, tmp_path)
    elsewhere = same_classes(tmp_path)
    settings = curve_config(digits_set, elsewhere, head="second", rule="fixed")
    result = measure_curve(base, two, tmp_path / "c", settings)
    end = result["points"][-1]["test"]["sets"]
    assert end["digits"]["accuracy"] == evaluate(two, digits_set, "test", head="second")


def test_flyp_blends_both_towers(base, digits_set, inverted_set, tmp_path: Path):
    tuned = tmp_path / "tuned"
    train(base, tuned, config(digits_set, method="flyp", lr=3e-3, iterations=20))
    settings = curve_config(digits_set, inverted_set, rule="fixed")
    result = measure_curve(base, tuned, tmp_path / "curve", settings)
    for alpha, point in zip(ALPHAS, result["points"], strict=True):
        interpolate_models(base, tuned, tmp_path / f"{alpha}", alpha)
        for data in (digits_set, inverted_set):
            expected = evaluate(tmp_path / f"{alpha}", data, "test")
            assert point["test"]["sets"][data.name]["accuracy"] == pytest.approx(expected)


def test_end_is_open_clips_accuracy(base, digits_set, inverted_set, tmp_path: Path):
    """Alpha 1 is what open_clip measures of the fine-tuned directory."""
    tuned = tmp_path / "tuned"
    train(base, tuned, config(digits_set, iterations=30))
    result = measure_curve(base, tuned, tmp_path / "c", curve_config(digits_set, inverted_set))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tuned}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tuned}")
    for path in (digits_set, inverted_set):
        data = open_set(path, "test")
        fills = [lambda c, t=t: t.replace("{c}", c) for t in data.templates]
        with torch.no_grad():
            classifier = open_clip.build_zero_shot_classifier(
                model.eval(), tokenizer, data.class_names, fills
            )
            images = [Image.open(io.BytesIO(data.read(row))) for row in range(len(data))]
            features = model.encode_image(torch.stack([transform(i) for i in images]))
        right = ((features @ classifier).argmax(1).numpy() == data.label_N).mean()
        assert result["points"][-1]["test"]["sets"][path.name]["accuracy"] == right


def test_wilson_is_scipys():
    for hits, count in ((0, 5), (3, 7), (50, 50), (812, 1000)):
        exact = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_gain_is_of_the_same_images():
    """Its interval is the bootstrap's over images, and narrower than that of two samples."""
    rng = np.random.default_rng(0)
    right = rng.random((2, 400)) < 0.6
    right[1] = np.where(rng.random(400) < 0.1, ~right[0], right[0])  # one in ten differs
    other = rng.random((2, 300)) < 0.5
    scores = Scores({"id": {"a": right}, "ood": {"b": other}})
    gain = scores.gain(1, 0)
    means = []
    for _ in range(2000):
        a, b = rng.integers(0, 400, 400), rng.integers(0, 300, 300)
        drawn = [x[:, rows].mean(axis=1) for x, rows in ((right, a), (other, b))]
        means.append(np.mean([d[1] - d[0] for d in drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    assert (gain["low"], gain["high"]) == pytest.approx((low, high), abs=0.004)
    first, second = (scores.point(n)["mean_interval"] for n in (0, 1))
    assert gain["high"] - gain["low"] < (second[1] - second[0]) + (first[1] - first[0])


def test_refused(base: Path, finetuned: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    def attempt(ood: Path = inverted_set, **options: object) -> None:
        measure_curve(base, finetuned, tmp_path / "c", curve_config(digits_set, ood, **options))

    with pytest.raises(FinetuneError, match="both named 'digits'"):
        attempt(ood=digits_set)
    with pytest.raises(FinetuneError, match="chosen on the data it is reported on"):
        attempt(val_split="test")
    for alphas in ("0.5,1", "0,0,1", "0,1,2", "0;1"):
        with pytest.raises(FinetuneError, match="--alphas"):
            attempt(alphas=alphas)
    with pytest.raises(FinetuneError, match=r"takes alpha 0\.5"):
        attempt(alphas="0,1", rule="fixed")
    with pytest.raises(FinetuneError, match="nothing to set against --id"):
        curve_config(digits_set)
    with pytest.raises(FinetuneError, match="name a shifted set with --ood"):
        curve_config(digits_set, control=(inverted_set,), rule="best-mean")
    rotten = write_set(tmp_path / "rotten", {"test": [*digits(0, 9), (b"?", 1)]})
    with pytest.raises(FinetuneError, match="1 of 10 images cannot be decoded"):
        attempt(ood=rotten)
    train(base, tmp_path / "tuned", config(digits_set, iterations=3, warmup=1))
    settings = curve_config(digits_set, inverted_set, val_split="train")
    with pytest.raises(FinetuneError, match=r"trained on .*digits/train, .* another --val-split"):
        measure_curve(base, tmp_path / "tuned", tmp_path / "c", settings)
    assert not (tmp_path / "c").exists()


def test_alphas_beyond_the_ends(base, finetuned, digits_set, inverted_set, tmp_path: Path):
    settings = curve_config(
        digits_set, inverted_set, alphas="-0.5,0,1,1.5", extrapolate=True, rule="best-id"
    )
    result = measure_curve(base, finetuned, tmp_path / "c", settings)
    interpolate_models(base, finetuned, tmp_path / "o", 1.5, extrapolate=True)
    found = result["points"][-1]["test"]["sets"]["digits"]["accuracy"]
    assert found == evaluate(tmp_path / "o", digits_set, "test")


def test_another_transform_is_refused(base, digits_set, inverted_set, tmp_path: Path):
    """Trained at another resolution, it is no end of the same curve."""
    train(base, tmp_path / "big", config(digits_set, image_size=24, iterations=3, warmup=1))
    settings = curve_config(digits_set, inverted_set)
    with pytest.raises(FinetuneError, match=r"vision_cfg\.image_size is 24 there, 16 here"):
        measure_curve(base, tmp_path / "big", tmp_path / "c", settings)


def test_base_with_a_head_of_its_own(own_base, finetuned, digits_set, inverted_set, tmp_path):
    """--head of models that `train` did not make: blended with base's head of that name."""
    for path, shift in ((own_base, 0.0), (tmp_path / "tuned", 3.0)):
        loaded = load_model(own_base if shift == 0 else finetuned)
        if shift:
            from clip_models import save_model

            save_model(path, loaded.model, loaded.preprocess)
            loaded = load_model(path)
        head = build_head(loaded, NAMES, ["{c}"])
        with torch.no_grad():
            head.weight[3] += shift
        save_head(path, "mine", head)
    settings = curve_config(digits_set, inverted_set, head="mine", rule="fixed")
    result = measure_curve(own_base, tmp_path / "tuned", tmp_path / "c", settings)
    interpolated = result["points"][2]["test"]["sets"]["digits"]["accuracy"]
    heads = [load_head(path, "mine") for path in (own_base, tmp_path / "tuned")]
    interpolate_models(own_base, finetuned, tmp_path / "half", 0.5)
    loaded, data = load_model(tmp_path / "half"), open_set(digits_set, "test")
    batch = torch.stack([loaded.preprocess.eval(data.read(row)) for row in range(len(data))])
    with torch.no_grad():
        features = loaded.model.encode_image(loaded.preprocess.normalize(batch), normalize=True)
    answers = (features @ (heads[0].weight + heads[1].weight).T).argmax(1).numpy()
    assert interpolated == (answers == data.label_N).mean()
