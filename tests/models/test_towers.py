"""Towers against open_clip, and the fast paths against the textbook ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import open_clip
import pytest
import torch
from clip_models import (
    CLIP,
    ModelConfig,
    ModelError,
    Tokenizer,
    architecture,
    architecture_names,
    load_model,
    save_model,
)
from clip_models.config import VisionConfig
from clip_models.image_tower import VisionTransformer
from clip_models.profiles import profile
from clip_models.weights import disk_name
from open_clip.push_to_hf_hub import save_for_hf
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from .conftest import CAPTIONS, KINDS, inputs, scattered, small_config

MakeModel = Callable[[str], Path]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_features_equal_open_clip(
    make_model: MakeModel, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    path = make_model(kind)
    ours = load_model(path).model.to(dtype)
    theirs = open_clip.create_model(f"local-dir:{path}").eval().to(dtype)
    images, tokens = inputs(ours.config, dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode_image(images), theirs.encode_image(images), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            ours.encode_text(tokens), theirs.encode_text(tokens), rtol=tolerance, atol=tolerance
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14"])
def test_open_clips_own_weights_both_ways(name: str) -> None:
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    images, tokens = torch.randn(2, 3, 224, 224), Tokenizer()(CAPTIONS)
    with TemporaryDirectory() as folder:  # gigabytes: not kept for three sessions as tmp_path is
        save_for_hf(
            theirs,
            SimpleNamespace(save_pretrained=lambda _: None),  # its tokenizer has nothing to save
            open_clip.get_model_config(name),
            f"{folder}/theirs",
            safe_serialization=True,
        )
        loaded = load_model(f"{folder}/theirs")
        ours = loaded.model
        save_model(f"{folder}/ours", ours, loaded.preprocess)
        back = open_clip.create_model(f"local-dir:{folder}/ours").eval()
    weights = theirs.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in back.state_dict().items())
    del theirs, weights
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours, back = ours.to(dtype), back.to(dtype)
        with torch.no_grad():
            for a, b in (
                (ours.encode_image(images.to(dtype)), back.encode_image(images.to(dtype))),
                (ours.encode_text(tokens), back.encode_text(tokens)),
            ):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_autocast_keeps_open_clips_dtypes(make_model: MakeModel) -> None:
    path = make_model("vit")
    ours, theirs = load_model(path).model, open_clip.create_model(f"local-dir:{path}").eval()
    images, tokens = inputs(ours.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for a, b in (
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(tokens), theirs.encode_text(tokens)),
        ):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_gradients_under_autocast_are_float32s() -> None:
    """As near as bfloat16's eight bits allow; the attention goes back in float32 on a CPU."""
    images, tokens = inputs(small_config("vit"))

    def run(enabled: bool) -> dict[str, Tensor]:
        model: CLIP = scattered(small_config("vit")).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            image, text, *_ = model(images, tokens)
        (image.float() * text.float().roll(1, 0)).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if "logit" not in name}
        assert all(grad is not None and grad.dtype == torch.float32 for grad in found.values())
        return {name: grad for name, grad in found.items() if grad is not None}

    exact, half = run(False), run(True)
    for name, gradient in exact.items():
        gap = (half[name] - gradient).norm() / gradient.norm()
        assert 0 < gap < 0.05, (name, gap)


@pytest.mark.parametrize("size", [32, 37])
def test_patches_equal_the_convolution(size: int) -> None:
    """Also where a border is left that no patch covers."""
    config = replace(small_config("vit").vision_cfg, image_size=size)
    tower = VisionTransformer(config, embed_dim=16, quick_gelu=False).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    patches = tower.conv1(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower._embed_patches(images), patches)


@pytest.mark.parametrize("kind", ["vit", "vit-quickgelu", "vit-eos", "timm-siglip"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fast_paths_equal_plain_ones(kind: str, checkpointing: bool) -> None:
    """Packed captions and the short last block: features and every gradient, in float64."""
    images, tokens = inputs(small_config(kind), torch.float64)

    def run(fast: bool) -> list[Tensor]:
        model: CLIP = scattered(small_config(kind)).double().train()
        model.visual.fast = model.text.fast = fast
        model.set_grad_checkpointing(checkpointing and fast)
        image, text, scale, _ = model(images, tokens)
        weights = torch.linspace(-1, 1, image.numel(), dtype=torch.float64).view_as(image)
        (scale * (image * weights).sum() + (text * weights.flip(0)).sum()).backward()
        gradients = [p.grad for n, p in model.named_parameters() if n != "logit_bias"]
        assert all(g is not None for g in gradients)
        return [image, text, *(g for g in gradients if g is not None)]

    for fast, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_repeat_on_several_threads(kind: str) -> None:
    """To the bit: nothing is summed up in the order in which threads come."""
    model = scattered(small_config(kind)).train()
    images, tokens = inputs(model.config)
    tokens = tokens.repeat(40, 1)  # enough for torch to divide among threads
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs: list[tuple[Tensor, ...]] = []
        for _ in range(5):
            torch.manual_seed(0)
            image, text, *_ = model(images, tokens)
            loss = image.square().sum() + text.square().sum()
            runs.append(torch.autograd.grad(loss, [*model.parameters()], allow_unused=True))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_features_before_the_projection(kind: str) -> None:
    model = scattered(small_config(kind))
    images, _ = inputs(model.config)
    with torch.no_grad():
        before, after = model.encode_image_pre(images), model.encode_image(images)
    assert before.ndim == 2
    if kind.startswith("vit"):
        torch.testing.assert_close(before @ model.visual.proj, after)
    elif kind not in ("timm-own", "timm-siglip"):
        torch.testing.assert_close(model.visual.head(before), after)


def test_patch_dropout_drops_patches_in_training_only() -> None:
    config = architecture("XS")
    vision = type(config.vision_cfg)(**{**vars(config.vision_cfg), "patch_dropout": 0.5})
    tower = scattered(type(config)(config.embed_dim, vision, config.text_cfg)).visual
    images, _ = inputs(config)
    assert torch.equal(tower(images), tower(images))
    lengths: list[int] = []
    tower.transformer.register_forward_pre_hook(lambda _, a: lengths.append(len(a[0])))
    tower.fast = False
    tower.train()(images)
    assert lengths == [len(images) * (1 + 8)]  # of 16 patches


def trainable(tower: torch.nn.Module) -> set[str]:
    return {name for name, p in tower.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["vit", "vit-siglip", "timm"])
@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 9])
def test_locked_towers_are_open_clips(make_model: MakeModel, kind: str, unlocked: int) -> None:
    path = make_model(kind)
    ours, theirs = load_model(path).model, open_clip.create_model(f"local-dir:{path}")
    ours.lock_image_tower(unlocked)
    theirs.visual.lock(unlocked)
    assert trainable(ours.visual) == trainable(theirs.visual)
    ours.lock_text_tower(unlocked)
    open_clip.transformer.lock_text_tower(theirs, unlocked)
    text = trainable(theirs.text if kind == "vit-siglip" else theirs)
    assert trainable(ours.text) == {n for n in text if not n.startswith(("visual.", "logit_"))}


def test_locked_batch_norms_keep_their_statistics() -> None:
    vision = VisionConfig(image_size=64, timm_model_name="test_resnet")
    model = CLIP(replace(architecture("XS"), vision_cfg=vision))
    model.lock_image_tower()
    before = {name: b.clone() for name, b in model.visual.named_buffers()}
    model.train().encode_image(inputs(model.config)[0])
    assert all(torch.equal(b, before[name]) for name, b in model.visual.named_buffers())


@pytest.mark.parametrize("layers", [2, 10])  # more blocks than torch's limit on recompilation
def test_compiled_once_for_all_caption_lengths(layers: int) -> None:
    config = architecture("XS")
    model = CLIP(replace(config, text_cfg=replace(config.text_cfg, layers=layers))).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    images, _ = inputs(config)
    frames: list[int] = []
    for words in ([1, 5, 9, 2, 7, 2], [3, 3, 20, 4, 8, 1], [30, 2, 2, 6, 7, 9], [4, 4, 4, 4, 4, 4]):
        tokens = Tokenizer()(["word " * count for count in words])
        for a, b in zip(compiled(images, tokens)[:2], model(images, tokens)[:2], strict=True):
            torch.testing.assert_close(a, b)
            a.sum().backward()
        frames.append(counter.frame_count)
    # the second batch makes the number of tokens symbolic; nothing is compiled after it
    assert frames[1] == frames[3]


def test_wrong_input_shapes_are_named() -> None:
    model = scattered(architecture("XS"))
    with pytest.raises(ModelError, match=r"\[B, 3, 64, 64\]"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ModelError, match="at most 77"):
        model.encode_text(torch.zeros(1, 78, dtype=torch.int64))


# The paper's figures: millions of parameters, GMACs of an image and of a text (2212.07143)
PAPER = {
    "ViT-B-32": (151.28, 4.41, 2.98),
    "ViT-B-16": (149.62, 17.58, 2.98),
    "ViT-L-14": (427.62, 81.08, 6.66),
    "ViT-H-14": (986.11, 167.40, 23.57),
    "ViT-g-14": (1366.68, 267.18, 23.57),
    "ViT-bigG-14": (2539.57, 483.96, 48.96),
}


@pytest.mark.parametrize("name", architecture_names())
def test_architectures(name: str) -> None:
    """Equal to open_clip's of the same name, and of the size that the paper prints."""
    config = architecture(name)
    figures = profile(config)
    with torch.device("meta"):
        built = sum(p.numel() for p in CLIP(config).parameters())
    assert figures["parameters"] == built
    if name in PAPER:
        millions, image, text = PAPER[name]
        assert figures["parameters"] / 1e6 == pytest.approx(millions, abs=0.015)
        assert figures["gmacs"] == pytest.approx(image + text, rel=0.003)
    if (theirs := open_clip.get_model_config(name)) is not None:
        expected = type(config).from_dict(theirs)
        assert config == expected


def test_every_published_config_but_coca_is_read() -> None:
    """Of open_clip's own list; native towers must have its names and shapes."""
    for name in open_clip.list_models():
        values = dict(open_clip.get_model_config(name))
        if name.startswith("coca_"):
            with pytest.raises(ModelError, match="not supported"):
                ModelConfig.from_dict(values)
            continue
        config = ModelConfig.from_dict(values)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name
        if config.vision_cfg.timm_model_name or config.text_cfg.hf_model_name:
            continue
        custom = values.pop("custom_text", False)
        builder = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        with torch.device("meta"):
            theirs = {n: p.shape for n, p in builder(**values).named_parameters()}
            ours = {disk_name(n, config): p.shape for n, p in CLIP(config).named_parameters()}
        assert ours == theirs, name
