"""Other image sizes and context lengths, against open_clip's interpolation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from click.testing import CliRunner
from clip_models import CLIP, ModelError, architecture, load_model
from clip_models.cli import main
from clip_models.config import VisionConfig
from clip_models.resize import resize

from .conftest import scattered, small_config

MakeModel = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["vit", "vit-siglip"])
@pytest.mark.parametrize(("size", "length"), [(96, 40), (32, 120)])
def test_features_are_open_clips(make_model: MakeModel, kind: str, size: int, length: int) -> None:
    path = make_model(kind)
    output = path.with_name("resized")
    options = ["--image-size", str(size), "--context-length", str(length)]
    result = CliRunner().invoke(main, ["resize", str(path), str(output), *options])
    assert result.exit_code == 0, result.output
    loaded = load_model(output)
    assert json.loads(result.stdout)["fingerprint"] == loaded.fingerprint
    assert loaded.preprocess.size == size
    theirs = open_clip.create_model(
        f"local-dir:{path}", force_image_size=size, force_context_length=length
    ).eval()
    images, tokens = torch.randn(3, 3, size, size), loaded.tokenizer(["", "a cat", "dogs " * 90])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.encode_image(images), theirs.encode_image(images), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            loaded.model.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-5
        )


def test_convolutional_towers_take_any_size() -> None:
    model = scattered(small_config("timm"))
    resized = resize(model, image_size=96)
    assert resized.config.vision_cfg.image_size == 96
    assert resized.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 64)
    for a, b in zip(model.parameters(), resized.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_resized_is_named() -> None:
    model = scattered(small_config("timm-siglip"))
    with pytest.raises(ModelError, match="test_vit3 does not take 96 pixels"):
        resize(model, image_size=96)
    xs = architecture("XS")
    with pytest.raises(ModelError, match="at least patch_size"):
        resize(CLIP(xs), image_size=8)
    with pytest.raises(ModelError, match="start and end"):
        resize(CLIP(xs), context_length=1)
    resnet = VisionConfig(image_size=64, layers=(1, 1, 1, 1), width=16)
    with pytest.raises(ModelError, match="fixed by their pooling"):
        resize(CLIP(replace(xs, vision_cfg=resnet)), image_size=96)
