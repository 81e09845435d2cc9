"""Model directories: both directions with open_clip, strict reading, atomic writing."""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from clip_models import (
    ModelError,
    Preprocess,
    fingerprint_of,
    load_model,
    read_model_config,
    save_model,
)
from safetensors.torch import load_file, save_file

from .conftest import KINDS, scattered, small_config

MakeModel = Callable[[str], Path]
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_open_clip_is_exact(make_model: MakeModel, kind: str) -> None:
    path = make_model(kind)
    theirs = open_clip.create_model(f"local-dir:{path}").state_dict()
    ours = load_file(path / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)

    loaded = load_model(path)
    save_model(path.with_name("again"), loaded.model, loaded.preprocess)
    again = load_file(path.with_name("again") / WEIGHTS)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert fingerprint_of(path.with_name("again")) == loaded.fingerprint


def test_a_loaded_model_is_complete(make_model: MakeModel) -> None:
    loaded = load_model(make_model("vit"))
    assert loaded.provenance["made_by"] == "a test"
    assert loaded.config == small_config("vit")
    assert not loaded.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.preprocess.size == 64
    assert loaded.fingerprint.startswith("sha256:")


def test_half_precision_weights_become_float32(make_model: MakeModel) -> None:
    path = make_model("vit")
    halved = {name: tensor.half() for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(halved, path / WEIGHTS)
    loaded = load_model(path)
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_existing_directories_do_not_change(make_model: MakeModel) -> None:
    path = make_model("vit")
    before = fingerprint_of(path)
    with pytest.raises(ModelError, match="exists"):
        save_model(path, scattered(small_config("vit"), seed=9), Preprocess(64))
    assert fingerprint_of(path) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_model(tmp_path / "m", scattered(small_config("vit")), Preprocess(64), {"x": object()})
    assert list(tmp_path.iterdir()) == []


def edit_config(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((path / CONFIG).read_text())
    change(values)
    (path / CONFIG).write_text(json.dumps(values))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / CONFIG).unlink(), "not a model directory"),
    "config not JSON": (lambda p: (p / CONFIG).write_text("{"), "is not JSON"),
    "config a list": (lambda p: (p / CONFIG).write_text("[]"), "must hold a table"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "pickled weights": (
        lambda p: (p / WEIGHTS).rename(p / "open_clip_pytorch_model.bin"),
        "found open_clip_pytorch_model.bin, which would have to be unpickled",
    ),
    "truncated": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:5000]),
        "is damaged",
    ),
    "missing key": (
        lambda p: edit_weights(p, lambda w: w.pop("visual.proj")),
        "lacks visual.proj",
    ),
    "surplus key": (
        lambda p: edit_weights(p, lambda w: w.update(extra=torch.zeros(1))),
        "unexpected extra",
    ),
    "wrong shape": (
        lambda p: edit_weights(p, lambda w: w.update({"visual.proj": torch.zeros(3, 4)})),
        r"visual.proj of shape \(3, 4\) where its config asks for \(64, 64\)",
    ),
    "unknown field": (
        lambda p: edit_config(p, lambda c: c["model_cfg"].update(novelty=1)),
        "model_cfg: unknown field 'novelty'",
    ),
    "unsupported field": (
        lambda p: edit_config(p, lambda c: c["model_cfg"]["vision_cfg"].update(qk_norm=True)),
        "qk_norm = True is not supported",
    ),
    "missing field": (
        lambda p: edit_config(p, lambda c: c["model_cfg"].pop("embed_dim")),
        "field 'embed_dim' is missing",
    ),
    "bad heads": (
        lambda p: edit_config(p, lambda c: c["model_cfg"]["text_cfg"].update(heads=7)),
        "width 64 must be a multiple of heads 7",
    ),
    "bad preprocess": (
        lambda p: edit_config(p, lambda c: c["preprocess_cfg"].update(resize_mode="stretch")),
        "resize_mode 'stretch'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(make_model: MakeModel, fault: str) -> None:
    path = make_model("vit")
    damage, message = FAULTS[fault]
    damage(path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_timm_model_is_named(make_model: MakeModel) -> None:
    path = make_model("timm")
    edit_config(path, lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="nosuchnet"))
    with pytest.raises(ModelError, match="no model 'nosuchnet'"):
        load_model(path)


def test_config_is_read_without_weights(make_model: MakeModel) -> None:
    path = make_model("timm")
    (path / WEIGHTS).unlink()
    config, values = read_model_config(path)
    assert config == small_config("timm")
    assert values["preprocess_cfg"]["size"] == 64
