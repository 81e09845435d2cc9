import json
from pathlib import Path

import pytest
import torch
from clip_finetune import FinetuneError, interpolate_models, measure_curve, open_set
from clip_finetune.curve import wilson
from clip_models import build_head, load_model, save_model
from scipy.stats import binomtest

from .conftest import digits, write_set

ALPHAS = (0.0, 0.25, 0.5, 1.0)


def evaluate(model: Path, data: Path, split: str) -> float:
    """One directory on one split, image by image."""
    loaded, samples = load_model(model), open_set(data, split)
    head = build_head(loaded, samples.class_names, samples.templates)
    hits = 0
    for row in range(len(samples)):
        image = loaded.preprocess.normalize(loaded.preprocess.eval(samples.read(row))[None])
        with torch.no_grad():
            answer = head.logits(loaded.model.encode_image(image)).argmax().item()
        hits += answer == samples.label_N[row]
    return hits / len(samples)


def test_equals_interpolated_directories(base, finetuned, digits_set, inverted_set, tmp_path: Path):
    settings = {"id_set": digits_set, "ood_sets": [inverted_set], "alphas": ALPHAS, "workers": 0}
    result = measure_curve(base, finetuned, tmp_path / "curve", rule="best-mean", **settings)
    for alpha, point in zip(ALPHAS, result["points"], strict=True):
        model = tmp_path / f"at-{alpha}"
        interpolate_models(base, finetuned, model, alpha)
        for data in (digits_set, inverted_set):
            for key, split in (("test", "test"), ("validation", "val")):
                got = point[key]["sets"][data.name]["accuracy"]
                assert got == pytest.approx(evaluate(model, data, split)), (alpha, data, split)
        test = point["test"]
        assert test["mean"] == pytest.approx((test["id"] + test["ood"]) / 2)
    best = max(point["validation"]["mean"] for point in result["points"])
    assert result["chosen"]["validation"]["mean"] == best
    assert json.loads((tmp_path / "curve/curve.json").read_text()) == result
    assert (tmp_path / "curve/curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        measure_curve(base, finetuned, tmp_path / "curve", rule="best-mean", **settings) == result
    )
    with pytest.raises(FinetuneError, match=r"another run's \(rule is best-mean there, fixed here"):
        measure_curve(base, finetuned, tmp_path / "curve", rule="fixed", **settings)


def test_alpha_is_chosen_on_validation(base, finetuned, tmp_path: Path):
    """Validation labels that agree with one alpha, whatever test says."""
    images = [image for image, _ in digits(0, 40)]
    draft = write_set(tmp_path / "draft", {"val": [(image, 0) for image in images]})
    interpolate_models(base, finetuned, tmp_path / "half", 0.5)
    loaded, data = load_model(tmp_path / "half"), open_set(draft, "val")
    head = build_head(loaded, data.class_names, data.templates)
    batch = torch.stack([loaded.preprocess.eval(data.read(row)) for row in range(40)])
    with torch.no_grad():
        answers = head.logits(loaded.model.encode_image(loaded.preprocess.normalize(batch)))
    labels = answers.argmax(dim=1).tolist()
    order = [data.read(row) for row in range(40)]
    wrong = [(label + 1) % 10 for label in labels]
    splits = {
        "val": list(zip(order, labels, strict=True)),
        "test": list(zip(order, wrong, strict=True)),
    }
    id_set = write_set(tmp_path / "id", splits)
    ood = write_set(tmp_path / "ood", {"test": digits(50, 20)})
    settings = {"id_set": id_set, "ood_sets": [ood], "workers": 0, "alphas": ALPHAS}
    result = measure_curve(base, finetuned, tmp_path / "curve", **settings)
    assert result["chosen"]["validation"]["id"] == 1.0
    first = min(p["alpha"] for p in result["points"] if p["validation"]["id"] == 1.0)
    assert result["chosen"]["alpha"] == first
    fixed = measure_curve(base, finetuned, tmp_path / "fixed", rule="fixed", **settings)
    assert fixed["chosen"]["alpha"] == 0.5
    assert fixed["chosen"]["validation"] == {"sets": {}}
    with pytest.raises(FinetuneError, match="no split 'val'"):
        measure_curve(base, finetuned, tmp_path / "mean", rule="best-mean", **settings)


def test_wilson_is_scipys():
    for hits, count in ((0, 5), (3, 7), (50, 50), (812, 1000)):
        exact = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_refused(base: Path, finetuned: Path, digits_set: Path, inverted_set: Path, tmp_path: Path):
    def attempt(finetuned: Path = finetuned, ood: Path = inverted_set, **options: object) -> None:
        measure_curve(base, finetuned, tmp_path / "c", id_set=digits_set, ood_sets=[ood], **options)

    with pytest.raises(FinetuneError, match="both named 'digits'"):
        attempt(ood=digits_set)
    with pytest.raises(FinetuneError, match="chosen on the data it is reported on"):
        attempt(val_split="test")
    for alphas in ([0.5, 1], [0, 0, 1], [0, 1, 2]):
        with pytest.raises(FinetuneError, match="--alphas"):
            attempt(alphas=alphas)
    with pytest.raises(FinetuneError, match=r"takes alpha 0\.5"):
        attempt(alphas=[0, 1], rule="fixed")
    loaded = load_model(base)
    with torch.no_grad():
        loaded.model.logit_scale.add_(1)
    save_model(tmp_path / "other", loaded.model, loaded.preprocess, provenance={})
    with pytest.raises(FinetuneError, match="logit_scale is not"):
        attempt(finetuned=tmp_path / "other", workers=0)
    rotten = write_set(tmp_path / "rotten", {"test": [*digits(0, 9), (b"?", 1)]})
    with pytest.raises(FinetuneError, match="1 of 10 images cannot be decoded"):
        attempt(ood=rotten, workers=0)
    assert not (tmp_path / "c").exists()
