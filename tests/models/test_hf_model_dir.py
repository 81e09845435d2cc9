"""Model directories with a Hugging Face text model or tokenizer: both directions, offline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_models import CLIP, ModelError, Preprocess, fingerprint_of, load_model, save_model
from clip_models.config import TextConfig
from clip_models.model_dir import init_model
from clip_models.tokenizer import tokenizer_for
from open_clip.push_to_hf_hub import save_for_hf
from safetensors.torch import load_file, save_file

from .hugging_face import KINDS, TEXTS, clip_config, make_text_model, make_tokenizer

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def native_config(name: Path) -> Any:
    """SigLIP's kind: our text tower, a tokenizer of Hugging Face's."""
    tower = TextConfig(
        context_length=24,
        vocab_size=400,
        width=32,
        heads=2,
        layers=2,
        no_causal_mask=True,
        pool_type="last",
        proj_bias=True,
        norm_kwargs={"eps": 1e-6},
        hf_tokenizer_name=str(name),
        tokenizer_kwargs={"clean": "canonicalize"},
    )
    config = replace(clip_config(name), text_cfg=tower, custom_text=True, init_logit_bias=-10.0)
    return replace(config, init_logit_scale=2.3)


@pytest.mark.parametrize("kind", [*KINDS, "siglip"])
def test_both_directions_and_without_the_source(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kind == "siglip":
        make_tokenizer("mt5").save_pretrained(source)
        config = native_config(source)
    else:
        config = clip_config(make_text_model(kind, source))
    path = tmp_path / "model"
    init_model(config, path, seed=0)
    assert (path / "config.json").is_file() == (kind != "siglip")

    images = torch.randn(2, 3, 32, 32)
    theirs = open_clip.create_model(f"local-dir:{path}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{path}")(TEXTS)
    expected: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            expected += [
                theirs.to(dtype).encode_image(images.to(dtype)),
                theirs.encode_text(tokens),
            ]

    shutil.rmtree(source)
    loaded = load_model(path)
    ours = loaded.model
    assert torch.equal(loaded.tokenizer(TEXTS), tokens)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        single = [ours.encode_image(images), ours.encode_text(tokens)]
        ours.double()
        double = [ours.encode_image(images.double()), ours.encode_text(tokens)]
    for found, wanted in zip(single, expected[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for found, wanted in zip(double, expected[2:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)

    # a round trip changes no bit, and no file
    loaded = load_model(path)
    save_model(
        tmp_path / "again", loaded.model, loaded.preprocess, loaded.provenance, loaded.tokenizer
    )
    before, after = load_file(path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


@pytest.mark.parametrize("kind", ["roberta", "mt5"])
def test_a_directory_that_open_clip_saved(kind: str, tmp_path: Path) -> None:
    """It has the tokenizer's files but no config.json: that is found under the model's name."""
    source = make_text_model(kind, tmp_path / "source")
    config = clip_config(source)
    model_cfg = config.to_dict()
    torch.manual_seed(0)
    theirs = open_clip.CustomTextCLIP(**json.loads(json.dumps(model_cfg))).eval()
    theirs.visual.image_mean, theirs.visual.image_std = (0.5,) * 3, (0.5,) * 3
    tokenizer = open_clip.tokenizer.HFTokenizer(str(source), context_length=24)
    path = tmp_path / "theirs"
    save_for_hf(theirs, tokenizer, model_cfg, path, safe_serialization=True)
    assert not (path / "config.json").exists()

    loaded = load_model(path)
    tokens = tokenizer(TEXTS)
    assert torch.equal(loaded.tokenizer(TEXTS), tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=1e-5
        )
    # ours then holds what it needs
    save_model(tmp_path / "ours", loaded.model, loaded.preprocess, tokenizer=loaded.tokenizer)
    shutil.rmtree(source)
    assert fingerprint_of(tmp_path / "ours") == loaded.fingerprint
    assert torch.equal(load_model(tmp_path / "ours").tokenizer(TEXTS), tokens)
    with pytest.raises(ModelError, match=r"has no config\.json, and .*; put .*'s config\.json"):
        load_model(path)


def test_position_ids_of_older_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "model"
    init_model(clip_config(make_text_model("roberta", tmp_path / "source")), path, seed=0)
    weights = load_file(path / WEIGHTS)
    weights["text.transformer.embeddings.position_ids"] = torch.arange(44)[None]
    save_file(weights, path / WEIGHTS)
    load_model(path)


def test_a_new_model_starts_with_the_text_models_weights(tmp_path: Path) -> None:
    source = make_text_model("bert", tmp_path / "source")
    written = init_model(clip_config(source), tmp_path / "model", seed=0)
    assert written["text_weights"] == str(source)
    ours, theirs = load_file(tmp_path / "model" / WEIGHTS), load_file(source / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(ours[f"text.transformer.{name}"], theirs[name])

    random = clip_config(source, hf_model_pretrained=False)
    written = init_model(random, tmp_path / "random", seed=0)
    assert written["text_weights"] == "random"
    assert not torch.equal(
        load_file(tmp_path / "random" / WEIGHTS)[f"text.transformer.{name}"], theirs[name]
    )


def test_gradients_flow_and_a_locked_tower_stays(tmp_path: Path) -> None:
    path = tmp_path / "model"
    init_model(clip_config(make_text_model("roberta", tmp_path / "source")), path, seed=0)
    loaded = load_model(path)
    model, tokens = loaded.model.train(), loaded.tokenizer(TEXTS[1:3])
    output = model(torch.randn(2, 3, 32, 32), tokens)
    (output.image_features_BE @ output.text_features_BE.T * output.logit_scale).trace().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.lock_text_tower()
    assert {n for n, p in model.text.named_parameters() if p.requires_grad} == {
        "proj.0.weight",
        "proj.2.weight",
    }


def edit(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


FAULTS: dict[str, tuple[Any, str]] = {
    "no tokenizer": (
        lambda p: [f.unlink() for f in p.glob("tokenizer*")],
        "tokenizer .* cannot be read: .* it belongs into the model directory",
    ),
    "no vocabulary": (lambda p: (p / "tokenizer.json").unlink(), "has no vocabulary"),
    "no config": (lambda p: (p / "config.json").unlink(), r"has no config\.json, and .* put "),
    "own code": (lambda p: edit(p, auto_map={"AutoModel": "evil.Model"}), "code of its own"),
    "other model": (lambda p: edit(p, num_hidden_layers=2), "has the unexpected text.transformer"),
    "other width": (lambda p: edit(p, intermediate_size=40), "of shape .* where its config"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "model"
    init_model(clip_config(make_text_model("roberta", tmp_path / "source")), path, seed=0)
    shutil.rmtree(tmp_path / "source")
    damage, message = FAULTS[fault]
    damage(path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_nothing_is_written_without_the_tokenizer(tmp_path: Path) -> None:
    config = clip_config(make_text_model("roberta", tmp_path / "source"))
    model = CLIP(config)
    with pytest.raises(ModelError, match="is saved with it"):
        save_model(tmp_path / "model", model, Preprocess(32))
    assert not (tmp_path / "model").exists()
    save_model(tmp_path / "model", model, Preprocess(32), tokenizer=tokenizer_for(config))
