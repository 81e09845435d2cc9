"""transformers' CLIPModel both ways, and its SiglipModel to open_clip's layout."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from clip_models import (
    ModelError,
    Preprocess,
    architecture,
    architecture_names,
    fingerprint_of,
    load_model,
    save_model,
)
from clip_models.config import PreprocessConfig
from clip_models.convert import convert
from clip_models.convert_export import export_transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from .conftest import CAPTIONS, scattered, small_config

MakeModel = Callable[[str], Path]
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# ids below the end of text, and padding
TOKENS = torch.tensor([[98, 5, 6, 99, *[0] * 8], [98, *range(10), 99], [98, 99, *[0] * 10]])


@register_model
def vit_test_patch8_siglip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A small tower by a name that timm's SigLIP towers have; its GELU is SigLIP's."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    options = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
    given = {n: v for n, v in kwargs.items() if n in ("num_classes", "global_pool")}
    return VisionTransformer(**{**size, "mlp_ratio": 2.5, **options, **given})


def clip_model(seed: int = 0, **text: Any) -> CLIPModel:
    vision = {"image_size": 32, "patch_size": 8}
    act = {"hidden_act": text.pop("hidden_act", "quick_gelu")}
    small = {
        "vocab_size": 100,
        "max_position_embeddings": 12,
        "eos_token_id": 99,
        "bos_token_id": 98,
    }
    config = CLIPConfig(
        projection_dim=48,
        vision_config={**TOWER, **vision, **act},
        text_config={**TOWER, **small, **act, **text},
    )
    return spread(CLIPModel(config), seed)


def siglip_model(**vision: Any) -> SiglipModel:
    config = SiglipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8, **vision},
        text_config={
            **TOWER,
            "vocab_size": 100,
            "max_position_embeddings": 12,
            "bos_token_id": 98,
            "eos_token_id": 99,
        },
    )
    return spread(SiglipModel(config), 0)


def spread(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def features(output: Any) -> Tensor:
    """transformers 5 returns an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def same_features(ours: nn.Module, theirs: Any, tokens: Tensor = TOKENS, size: int = 32) -> None:
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-10)):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        images = torch.randn(3, 3, size, size, dtype=dtype)
        near = {"rtol": tolerance, "atol": tolerance}
        with torch.no_grad():
            torch.testing.assert_close(
                ours.encode_image(images), features(theirs.get_image_features(images)), **near
            )
            torch.testing.assert_close(
                ours.encode_text(tokens), features(theirs.get_text_features(tokens)), **near
            )
            for name in ("logit_scale", "logit_bias"):
                if hasattr(theirs, name):
                    torch.testing.assert_close(
                        getattr(ours, name).item(), getattr(theirs, name).item()
                    )


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"hidden_act": "gelu"},
        {"eos_token_id": 2},
        {"layer_norm_eps": 1e-6},
        {"eos_token_id": 7},
    ],
    ids=["quick_gelu", "gelu", "legacy eos", "text eps", "other eos"],
)
def test_a_clip_model_gives_its_features(tmp_path: Path, text: dict[str, Any]) -> None:
    theirs = clip_model(**text)
    theirs.save_pretrained(tmp_path / "theirs")
    result = convert(tmp_path / "theirs", tmp_path / "ours")
    assert result["format"] == "transformers CLIPModel"
    assert result["parameters"] == sum(p.numel() for p in theirs.parameters())
    tokens = TOKENS.clone()
    tokens[:, 2] = 7
    same_features(load_model(tmp_path / "ours").model, theirs, tokens)
    again = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    same_features(again, theirs, tokens)


def test_older_files_of_clip_models(tmp_path: Path) -> None:
    """Pickled weights with buffers of old, shards, and the doubled tables of early versions."""
    theirs = clip_model()
    path = tmp_path / "theirs"
    theirs.save_pretrained(path)
    convert(path, tmp_path / "ours")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    ids = {
        f"{tower}_model.embeddings.position_ids": torch.ones(1, 3) for tower in ("text", "vision")
    }
    names, half = sorted(weights), len(weights) // 2
    torch.save({**ids, **{n: weights[n] for n in names[:half]}}, path / "1.bin")
    torch.save({n: weights[n] for n in names[half:]}, path / "2.bin")
    index = {n: "1.bin" if n in names[:half] else "2.bin" for n in names}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    values = json.loads((path / "config.json").read_text())
    values["text_config_dict"] = values["text_config"]
    values["text_config"] = {"hidden_size": 512}
    (path / "config.json").write_text(json.dumps(values))
    result = convert(path, tmp_path / "again")
    assert result["fingerprint"] == fingerprint_of(tmp_path / "ours")


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usual": (
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
        {},
    ),
    "old": (
        {"size": 32, "crop_size": 32, "resample": 2, "do_center_crop": True},
        {"interpolation": "bilinear"},
    ),
    "squash": (
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"resize_mode": "squash"},
    ),
}


@pytest.mark.parametrize("how", PROCESSORS)
def test_preprocessing_comes_along(tmp_path: Path, how: str) -> None:
    clip_model().save_pretrained(tmp_path / "theirs")
    values, expected = PROCESSORS[how]
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps({**values, **half}))
    convert(tmp_path / "theirs", tmp_path / "ours")
    config = load_model(tmp_path / "ours").preprocess.config
    assert config == PreprocessConfig((0.5,) * 3, (0.25,) * 3, **expected)


def test_a_tokenizer_of_its_own_comes_along(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "theirs"
    clip_model().save_pretrained(path)
    words.save_pretrained(path)
    convert(path, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    assert loaded.config.text_cfg.hf_tokenizer_name == "theirs"
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'ours'}")
    assert torch.equal(loaded.tokenizer(["a cat", "dog"]), theirs(["a cat", "dog"]))
    assert loaded.tokenizer(["a cat"])[0, :3].tolist() == [1, 2, 0]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"pad": 0, "a": 1, "cat": 2, "dog": 3, "unk": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="unk"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="pad", unk_token="unk")


def test_a_siglip_model_gives_its_features(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    theirs = siglip_model()
    path = tmp_path / "theirs"
    theirs.save_pretrained(path)
    words.save_pretrained(path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    result = convert(path, tmp_path / "ours")
    assert result["format"] == "transformers SiglipModel"
    loaded = load_model(tmp_path / "ours")
    same_features(loaded.model, theirs)
    again = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    same_features(again, theirs)
    assert loaded.preprocess.config == PreprocessConfig(
        (0.5,) * 3, (0.5,) * 3, resize_mode="squash"
    )
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'ours'}")(["A cat.", "dog"])
    assert torch.equal(loaded.tokenizer(["A cat.", "dog"]), tokens)
    assert tokens[0, :3].tolist() == [1, 2, 0]
    published = open_clip.get_model_config("ViT-B-16-SigLIP2")
    ours = loaded.config.to_dict()
    assert ours.keys() == published.keys()
    for tower in ("vision_cfg", "text_cfg"):
        same = ("timm_pool", "timm_proj", "no_causal_mask", "proj_bias", "pool_type", "act_kwargs")
        for name in (*same, "norm_kwargs", "tokenizer_kwargs"):
            assert ours[tower].get(name) == published[tower].get(name)


def test_a_tower_with_timms_own_gelu_is_said(
    tmp_path: Path, words: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    siglip_model(hidden_act="gelu").save_pretrained(tmp_path / "theirs")
    words.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert "vit_test_patch8_siglip_32 has another GELU than gelu" in caplog.text


@pytest.mark.parametrize(
    "kind",
    [
        "vit",
        "vit-quickgelu",
        "vit-tanh",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ViT-B-32", "ViT-B-16-quickgelu")),
    ],
)
def test_export_and_back_is_exact(tmp_path: Path, kind: str) -> None:
    published = kind in architecture_names()
    config = architecture(kind) if published else small_config(kind.replace("-tanh", ""))
    size = config.vision_cfg.image_size
    if kind == "vit-tanh":
        text = replace(
            config.text_cfg, act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-6}
        )
        config = replace(config, text_cfg=text)
    path, theirs = tmp_path / kind, tmp_path / "theirs"
    preprocess = PreprocessConfig((0.5,) * 3, (0.25,) * 3, "bilinear", "squash")
    save_model(path, scattered(config), Preprocess(size, preprocess))
    result = export_transformers(path, theirs)
    assert result["fingerprint"] == fingerprint_of(path)
    loaded, model = load_model(path), CLIPModel.from_pretrained(theirs).eval()
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    same_features(loaded.model, model, loaded.tokenizer(CAPTIONS), size)
    assert convert(theirs, tmp_path / "back")["fingerprint"] == fingerprint_of(path)
    back = load_model(tmp_path / "back")
    assert back.config == config
    assert back.preprocess.config == preprocess
    assert all(
        torch.equal(a, b)
        for a, b in zip(back.model.parameters(), load_model(path).model.parameters(), strict=True)
    )


def test_the_exported_processor_is_ours(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("vit")
    export_transformers(path, tmp_path / "theirs")
    loaded, processor = load_model(path), CLIPProcessor.from_pretrained(tmp_path / "theirs")
    assert type(AutoProcessor.from_pretrained(tmp_path / "theirs")) is CLIPProcessor
    texts = [*CAPTIONS, "It's 3 o'clock; ÀÉÎ ñ  北京, \n don't!", "x" * 300, "l'été 1999"]
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "theirs")):
        theirs = tokenizer(
            texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        tokens = theirs["input_ids"].where(theirs["attention_mask"] == 1, 0)
        assert torch.equal(tokens, loaded.tokenizer(texts))
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (90, 120, 3), generator=rng, dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    ours = loaded.preprocess.eval((tmp_path / "image.png").read_bytes())[None]
    theirs = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    # their resize is torchvision's on tensors, within a step of Pillow's
    difference = (loaded.preprocess.normalize(ours) - theirs).abs()
    assert difference.max() < 3 / 255 / 0.26
    assert difference.mean() < 0.3 / 255 / 0.26


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vit-avg", "has no avg pooling of images"),
        ("vit-clipa", "has no avg pooling of images"),
        ("vit-bias", "has no logit bias"),
        ("vit-eos", "has no layer scale"),
        ("vit-siglip", "has no "),
        ("timm", r"has no timm tower \(convnext_atto\)"),
    ],
)
def test_what_a_clip_model_cannot_be(
    make_model: MakeModel, tmp_path: Path, kind: str, message: str
) -> None:
    path = make_model(kind)
    with pytest.raises(ModelError, match=message) as caught:
        export_transformers(path, tmp_path / "theirs")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def broken_clip_model(path: Path, fault: str) -> None:
    clip_model().save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    match fault:
        case "bert":
            values["model_type"] = "bert"
        case "acts":
            values["vision_config"]["hidden_act"] = "gelu"
        case "relu":
            values["vision_config"]["hidden_act"] = values["text_config"]["hidden_act"] = "relu"
        case "eps":
            values["vision_config"]["layer_norm_eps"] = 1e-6
        case "oblong":
            values["vision_config"]["image_size"] = [32, 64]
        case "channels":
            values["vision_config"]["num_channels"] = 1
        case "missing":
            del weights["visual_projection.weight"]
        case "surplus":
            weights["classifier.weight"] = torch.ones(2, 2)
        case "shapes":
            weights["text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 3)
        case "layers":
            values["text_config"]["num_hidden_layers"] = 1
        case "word":
            values["text_config"]["hidden_size"] = "wide"
        case "no table":
            values["vision_config"] = [1]
        case "positions":
            values["vision_config"]["image_size"] = 64
        case "no weights":
            (path / "model.safetensors").unlink()
        case "processor":
            values_there = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 256}
            (path / "preprocessor_config.json").write_text(json.dumps(values_there))
        case "config":
            (path / "config.json").write_text("{")
            return
        case _:
            raise AssertionError(fault)
    (path / "config.json").write_text(json.dumps(values))
    if (path / "model.safetensors").is_file():
        save_file(weights, path / "model.safetensors")


FAULTS = {
    "bert": "model_type 'bert'; of transformers' models only",
    "acts": "hidden_act 'gelu' for images and 'quick_gelu' for texts",
    "relu": "hidden_act 'relu'",
    "eps": "layer_norm_eps 1e-06 of the image tower",
    "oblong": r"image_size \[32, 64\]",
    "channels": "1 channels",
    "missing": "lacks visual_projection.weight",
    "surplus": "has the unexpected classifier.weight",
    "shapes": "q_proj.weight, .* do not fit together",
    "layers": "has the unexpected text_model.encoder.layers.1",
    "word": "a value of the wrong kind",
    "no table": "a value of the wrong kind",
    "positions": "17 positions in visual.positional_embedding, where 65 .*models resize",
    "no weights": "holds no weights; looked for model.safetensors",
    "processor": "its image processor does more or less than to resize to 32 pixels",
    "config": "is not JSON",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "theirs"
    broken_clip_model(path, fault)
    with pytest.raises(ModelError, match=FAULTS[fault]) as caught:
        convert(path, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_siglip_sizes_that_timm_lacks(tmp_path: Path) -> None:
    siglip_model(patch_size=4).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        ModelError, match=r"has no model vit_\*_patch4_siglip_32 with hidden_size 64"
    ):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_published_siglip_sizes_have_a_tower() -> None:
    """Widths that int(width * ratio) must give back, and timm's names of open_clip's models."""
    from clip_models.convert_transformers import _mlp_ratio, _timm_name

    sizes = {"vit_so400m_patch14_siglip_384": (1152, 27, 16, 4304, 14, 384)}
    sizes["vit_base_patch16_siglip_224"] = (768, 12, 12, 3072, 16, 224)
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name, size in sizes.items():
        tower = dict(zip((*fields, "patch_size", "image_size"), size, strict=True))
        tower["hidden_act"] = "gelu_pytorch_tanh"
        assert _timm_name(tower) == name
        assert int(size[0] * _mlp_ratio(tower)) == size[3]
    assert timm.is_model("vit_test_patch8_siglip_32")
