import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from clip_finetune import FinetuneError, interpolate_models, open_set
from clip_models import build_head, list_heads, load_head, load_model, save_head, save_model

from .conftest import SIZE, VIT, equal, save_random_model, weights


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_are_exact(base: Path, finetuned: Path, tmp_path: Path, alpha: float):
    result = interpolate_models(base, finetuned, tmp_path / "out", alpha)
    end = finetuned if alpha else base
    assert equal(tmp_path / "out", end)
    assert result["fingerprint"] == load_model(end).fingerprint


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_equals_arithmetic_in_float64(base: Path, finetuned: Path, tmp_path: Path, alpha: float):
    interpolate_models(base, finetuned, tmp_path / "out", alpha)
    theta0, theta1, theta = weights(base), weights(finetuned), weights(tmp_path / "out")
    for name in theta0:
        exact = (1 - alpha) * theta0[name].double() + alpha * theta1[name].double()
        torch.testing.assert_close(theta[name].double(), exact, atol=1e-7, rtol=1e-6)
        if not name.startswith("visual."):
            assert torch.equal(theta[name], theta0[name]), name  # equal ends stay bit-identical


def test_counters_come_from_the_nearer_end(resnet: Path, tmp_path: Path):
    loaded = load_model(resnet)
    counters = [b for n, b in loaded.model.named_buffers() if n.endswith("num_batches_tracked")]
    for counter in counters:
        counter.fill_(100)
    save_model(tmp_path / "moved", loaded.model, loaded.preprocess, provenance={})
    for alpha, expected in ((0.4, 0), (0.6, 100)):
        out = tmp_path / str(alpha)
        interpolate_models(resnet, tmp_path / "moved", out, alpha)
        values = [v for n, v in weights(out).items() if n.endswith("num_batches_tracked")]
        assert len(values) == len(counters) > 0
        assert all(int(value) == expected for value in values)


def test_opens_in_open_clip(base: Path, finetuned: Path, tmp_path: Path):
    out = tmp_path / "out"
    interpolate_models(base, finetuned, out, 0.4)
    theirs = open_clip.create_model(f"local-dir:{out}").eval()
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        ours = load_model(out).model.encode_image(images)
        torch.testing.assert_close(theirs.encode_image(images), ours, atol=1e-5, rtol=1e-5)


def test_heads(own_base: Path, finetuned: Path, digits_set: Path, tmp_path: Path):
    tuned = Path(shutil.copytree(finetuned, tmp_path / "tuned"))
    data = open_set(digits_set, "train")
    zero_shot = build_head(load_model(tuned), data.class_names, data.templates)
    save_head(tuned, "zero-shot", zero_shot)  # in one model only, but both have its text tower
    probes = {}
    for path, shift in ((own_base, 0.0), (tuned, 2.0)):
        head = replace(zero_shot, fingerprint=load_model(path).fingerprint, kind="probe")
        probes[path] = replace(head, weight=head.weight + shift, bias=head.bias + shift)
        save_head(path, "probe", probes[path])
        save_head(path, "other", replace(head, class_names=(*"0123456789"[:9], path.name)))
        save_head(path, f"only-{path.name}", head)

    result = interpolate_models(own_base, tuned, tmp_path / "out", 0.25)
    assert result["heads"] == list_heads(tmp_path / "out") == ["probe", "zero-shot"]
    kept = load_head(tmp_path / "out", "zero-shot")
    assert kept.kind == "zero-shot"
    assert torch.equal(kept.weight, zero_shot.weight)
    blended = load_head(tmp_path / "out", "probe")
    assert blended.kind == "interpolated"
    assert blended.fingerprint == result["fingerprint"]
    torch.testing.assert_close(blended.weight, zero_shot.weight + 0.5)
    torch.testing.assert_close(blended.bias, zero_shot.bias + 0.5)


def test_run_again(base: Path, finetuned: Path, tmp_path: Path):
    first = interpolate_models(base, finetuned, tmp_path / "out", 0.5)
    again = interpolate_models(base, finetuned, tmp_path / "out", 0.5)
    assert again == first | {"status": "nothing left to do"}
    with pytest.raises(FinetuneError, match=r"another run's \(alpha is 0\.5 there, 0\.6 here"):
        interpolate_models(base, finetuned, tmp_path / "out", 0.6)


def test_alpha_outside(base: Path, finetuned: Path, tmp_path: Path):
    with pytest.raises(FinetuneError, match=r"alpha is 1\.5; .*--extrapolate"):
        interpolate_models(base, finetuned, tmp_path / "out", 1.5)
    interpolate_models(base, finetuned, tmp_path / "out", 1.5, extrapolate=True)
    theta0, theta1, theta = weights(base), weights(finetuned), weights(tmp_path / "out")
    name = "visual.proj"
    torch.testing.assert_close(theta[name], -0.5 * theta0[name] + 1.5 * theta1[name])


def test_towers_of_different_shape(base: Path, tmp_path: Path):
    wide = save_random_model(tmp_path / "wide", VIT | {"width": 48})
    with pytest.raises(FinetuneError, match=r"vision_cfg\.width is 48 there, 32 here"):
        interpolate_models(base, wide, tmp_path / "out", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]
