"""The parts of recipes, beside timm's and open_clip's own."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from clip_finetune import FinetuneError, TrainConfig, open_set, train
from clip_finetune.augment import Augment, Erase
from clip_finetune.learner import Learner
from clip_finetune.optimizer import learning_rate, make_optimizer
from clip_finetune.recipes import RECIPES
from clip_finetune.tower import prepare_tower
from clip_models import (
    ImageError,
    Preprocess,
    build_head,
    decode_image,
    load_head,
    load_model,
    profile,
)
from PIL import Image
from torch import nn

from .conftest import NAMES, SIZE, config, digits, equal, metrics, save_random_model, weights


def learner_of(model: Path, settings: TrainConfig) -> Learner:
    loaded = load_model(model)
    return Learner(loaded.model, [build_head(loaded, NAMES, ["{c}"])], settings)


def test_recipes_are_valid():
    assert list(RECIPES)[:4] == ["joint-8", "wise-ft", "lp-ft", "flyp"]
    for name, values in RECIPES.items():
        head = ("probe",) if name == "lp-ft" else ()
        settings = TrainConfig(task=(Path("x"),), head=head, **values)
        assert settings.schedule(1_281_167)[0] > settings.schedule(1_281_167)[1] > 0
    assert TrainConfig(task=(Path("x"),), **RECIPES["joint-8"]) == TrainConfig(task=(Path("x"),))
    b32 = TrainConfig(task=(Path("x"),), **RECIPES["imagenet-1k-B-32"])
    assert (b32.lr, b32.batch_size, b32.layer_decay, b32.ema) == (1e-3, 4096, 0.65, 0.9998)
    assert b32.schedule(1_281_167) == (15640, 3128)  # 50 epochs, 10 of them warm-up


def test_learning_rate_is_wise_fts():
    """The figures of its `cosine_lr` at its own settings."""
    rates = [learning_rate(step, 3e-5, 1000, 500) for step in (0, 499, 500, 750, 999)]
    assert rates == pytest.approx([6e-8, 3e-5, 3e-5, 1.5e-5, 2.96e-10], rel=1e-3)


def test_layer_decay_is_timms(base: Path, resnet: Path):
    """The native ViT gets the rates that timm gives the same layers of its own ViT."""
    settings = config(Path("x"), layer_decay=0.5, decay="matrices", method="end-to-end")
    learner = learner_of(base, settings)
    name_of = {id(p): name for name, p in learner.named_parameters()}
    found = {
        name_of[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in make_optimizer(learner, settings).param_groups
        for p in group["params"]
    }
    assert found.keys() == {n for n, p in learner.named_parameters() if p.requires_grad}
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10, img_size=32)
    groups: Any = timm.optim.param_groups_layer_decay(
        theirs, 0.1, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.5
    )
    names = {id(p): name for name, p in theirs.named_parameters()}
    expected = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    for ours, other in {
        "visual.conv1.weight": "patch_embed.proj.weight",
        "visual.class_embedding": "cls_token",
        "visual.positional_embedding": "pos_embed",
        "visual.transformer.resblocks.0.attn.in_proj_weight": "blocks.0.attn.qkv.weight",
        "visual.transformer.resblocks.1.mlp.c_fc.bias": "blocks.1.mlp.fc1.bias",
        "visual.ln_post.weight": "norm.weight",
        "head.weight_0": "head.weight",
        "head.bias_0": "head.bias",
    }.items():
        assert found[ours] == expected[other], ours
    assert found["visual.proj"] == (1.0, 0.1)

    # a timm tower brings its own layers
    learner = learner_of(resnet, settings)
    scales = {g["lr_scale"] for g in make_optimizer(learner, settings).param_groups}
    assert len(scales) > 3
    assert max(scales) == 1.0


def test_decay_of_matrices_alone(base: Path):
    settings = config(Path("x"), decay="matrices")
    learner = learner_of(base, settings)
    name_of = {id(p): name for name, p in learner.named_parameters()}
    groups = make_optimizer(learner, settings).param_groups
    names = [{name_of[id(p)] for p in group["params"]} for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert "visual.proj" in names[0]
    assert {"visual.ln_post.weight", "visual.positional_embedding"} <= names[1]


def test_running_mean_is_what_out_holds(base: Path, digits_set: Path, tmp_path: Path):
    """After each step mean = decay mean + (1 - decay) weights; the first step begins it."""
    out = tmp_path / "mean"
    watched: list[dict[str, torch.Tensor]] = []
    step = Learner.after_step

    def watch(self: Learner) -> None:
        step(self)
        watched.append({n: w.clone() for n, w in self.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "after_step", watch)
        settings = config(digits_set, iterations=3, warmup=0, ema=0.5, method="end-to-end")
        train(base, out, settings)
    mean = watched[0]
    for state in watched[1:]:
        mean = {name: 0.5 * mean[name] + 0.5 * state[name] for name in mean}
    found = weights(out)
    for name, weight in mean.items():
        if name.startswith("visual."):
            torch.testing.assert_close(found[name], weight)
    torch.testing.assert_close(load_head(out, "digits").weight, mean["head.weight_0"])


def test_label_smoothing_is_torchs(base: Path):
    settings = config(Path("x"), label_smoothing=0.1)
    learner = learner_of(base, settings)
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([1, 2, 3, 4])
    loss, hits = learner(images, labels, 0)
    features = nn.functional.normalize(learner.visual(images), dim=-1)
    logits = features @ learner.head["weight_0"].T + learner.head["bias_0"]
    target = nn.functional.one_hot(labels, 10) * 0.9 + 0.01
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert hits == (logits.argmax(1) == labels).sum()


def test_drop_path_skips_whole_images(base: Path):
    """In training, each image alone; nothing in evaluation. Mean over draws is kept."""
    loaded = prepare_tower(load_model(base), image_size=0, drop_path=0.6)
    plain = load_model(base).model.visual
    visual: Any = loaded.model.visual
    images = torch.randn(6, 3, SIZE, SIZE)
    torch.testing.assert_close(visual.eval()(images), plain(images))
    visual.train()
    seen: list[torch.Tensor] = []
    visual.transformer.resblocks[1].ls_2.register_forward_hook(lambda *a: seen.append(a[2]))
    visual.transformer.resblocks[0].ls_1.register_forward_hook(lambda *a: seen.append(a[2]))
    torch.manual_seed(0)
    visual(images)
    first, last = seen
    assert not (first == 0).any()  # the first block's rate is 0
    dropped = (last == 0).all(dim=-1)
    assert dropped.shape == (6,)
    assert 0 < dropped.sum() < 6
    torch.manual_seed(0)
    again = visual(images)
    torch.manual_seed(0)
    assert torch.equal(again, visual(images))


def test_drop_path_of_a_timm_tower(resnet: Path, digits_set: Path, tmp_path: Path):
    loaded = prepare_tower(load_model(resnet), image_size=0, drop_path=0.5)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = load_model(resnet).model.encode_image(images)
    torch.testing.assert_close(loaded.model.encode_image(images), expected)
    rates = [m.drop_prob for m in loaded.model.visual.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == 0.5
    train(resnet, tmp_path / "out", config(digits_set, drop_path=0.5, iterations=3, warmup=1))
    assert load_model(tmp_path / "out").config == load_model(resnet).config


@pytest.mark.parametrize(
    ("tower", "changed"),
    [("base", {"drop_path": 0.5}), ("base", {"method": "flyp"}), ("resnet", {"drop_path": 0.5})],
)
def test_checkpointing_changes_memory_alone(
    tower: str,
    changed: dict[str, object],
    digits_set: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    """The same weights, bit for bit, from fewer activations."""
    kept: list[int] = []

    def keep(activation: torch.Tensor) -> torch.Tensor:
        if not isinstance(activation, nn.Parameter):
            kept[-1] += activation.nbytes
        return activation

    for checkpointing in (False, True):
        kept.append(0)
        settings = config(digits_set, grad_checkpointing=checkpointing, iterations=4, **changed)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda activation: activation):
            train(request.getfixturevalue(tower), tmp_path / str(checkpointing), settings)
    assert equal(tmp_path / "False", tmp_path / "True")
    assert kept[1] < 0.75 * kept[0]  # a small ResNet is mostly stem


def test_out_of_memory(
    base: Path, digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Learner, "forward", fail)
    with pytest.raises(FinetuneError, match=r"out of memory: CUDA.*hold less .*--grad-checkpoint"):
        train(base, tmp_path / "out", config(digits_set))


def test_another_resolution(base: Path, resnet: Path, digits_set: Path, tmp_path: Path):
    """Position embeddings as open_clip resizes them; the directory opens at the new size."""
    loaded = prepare_tower(load_model(base), image_size=24, drop_path=0.0)
    theirs: Any = open_clip.create_model(f"local-dir:{base}", force_image_size=24)
    torch.testing.assert_close(
        loaded.model.visual.positional_embedding, theirs.visual.positional_embedding.data
    )
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(
        loaded.model.encode_image(images), theirs.eval().encode_image(images), atol=1e-5, rtol=1e-5
    )
    out = tmp_path / "out"
    train(base, out, config(digits_set, image_size=24, iterations=3, warmup=1))
    opened = open_clip.create_model(f"local-dir:{out}").eval()
    assert load_model(out).preprocess.size == 24
    torch.testing.assert_close(
        opened.encode_image(images),
        load_model(out).model.encode_image(images),
        atol=1e-5,
        rtol=1e-5,
    )
    assert (
        profile(load_model(out).config)["parameters"]
        > profile(load_model(base).config)["parameters"]
    )
    assert prepare_tower(load_model(resnet), image_size=32, drop_path=0.0).preprocess.size == 32
    vit = save_random_model(
        tmp_path / "timm", {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    )
    with pytest.raises(FinetuneError, match="built for 160 pixels"):
        prepare_tower(load_model(vit), image_size=192, drop_path=0.0)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_augment_is_a_function_of_the_seed():
    augment, image = Augment("rand-m9-n2-inc1", Preprocess(SIZE)), digits(0, 1)[0][0]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    one, two, other = augment(image, 5), augment(image, 5), augment(image, 6)
    assert one.shape == (3, SIZE, SIZE)
    assert one.dtype == torch.uint8
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    # decoded as for CLIP's own crops: turned upright, the high byte of 16 bits, one kind of error
    ramp = np.arange(48 * 32 * 3).reshape(48, 32, 3) * 7
    stripes = Image.fromarray((ramp % 256).astype(np.uint8))
    wide = Image.fromarray((ramp[..., 0] * 2).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (encoded(stripes, "WEBP", lossless=True, exif=turned), encoded(wide, "PNG")):
        plain = encoded(Image.fromarray(decode_image(data)), "PNG")
        assert torch.equal(augment(data, 5), augment(plain, 5))
    broken = bytearray(image)
    broken[image.index(b"IDAT") + 4 :] = bytes(8)
    for data in (b"not an image", bytes(broken)):
        with pytest.raises(ImageError):
            augment(data, 0)
    with pytest.raises(FinetuneError, match="timm has no such policy"):
        Augment("nonsense-m9", Preprocess(SIZE))


def test_erasing():
    erase, images = Erase(0.5, torch.device("cpu")), torch.zeros(40, 3, SIZE, SIZE)
    erased = erase(images.clone(), 3)
    changed = (erased != 0).flatten(1).any(dim=1)
    assert 8 < changed.sum() < 32
    shares = (erased[changed] != 0).float().mean(dim=(1, 2, 3))
    assert shares.min() > 0.01
    assert shares.max() < 0.45
    assert torch.equal(erase(images.clone(), 3), erased)


def test_what_is_random_on_a_device_is_seeded(base: Path, digits_set: Path, tmp_path, monkeypatch):
    """There timm's noise comes from the device's generator, which `seeded` does not hold."""
    draws: list[float] = []

    def erase(images: torch.Tensor, _seed: int) -> torch.Tensor:
        draws.append(float(torch.rand(())))
        return images

    monkeypatch.setattr("clip_finetune.loop.Erase", lambda *_: erase)
    for before in (1, 2):
        torch.manual_seed(before)
        settings = config(digits_set, iterations=2, warmup=0, random_erasing=0.5)
        train(base, tmp_path / str(before), settings)
    assert draws[:2] == draws[2:]
    assert draws[0] != draws[1]


@pytest.mark.slow
def test_all_parts_together(base: Path, digits_set: Path, tmp_path: Path):
    """An ImageNet recipe, cut down: it learns, and with workers gives the same."""
    recipe = RECIPES["imagenet-1k-B-32"] | {
        "epochs": 3.0, "batch_size": 20, "ema": 0.5, "precision": "fp32", "image_size": 24,
    }  # fmt: skip
    runs = [tmp_path / "0", tmp_path / "2"]
    for workers, out in zip((0, 2), runs, strict=True):
        train(base, out, TrainConfig(task=(digits_set,), workers=workers, **recipe))
    assert equal(*runs)
    rows = metrics(runs[0])
    assert len(rows) == 30
    assert np.mean([r["loss"] for r in rows[-5:]]) < np.mean([r["loss"] for r in rows[:5]])
    assert load_head(runs[0], "digits").class_names == open_set(digits_set, "train").class_names
