"""OpenAI's ResNet tower against open_clip's."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from clip_models import CLIP, ModelConfig, ModelError, Preprocess, load_model, save_model
from clip_models.config import TextConfig, VisionConfig
from clip_models.resnet_tower import ModifiedResNet
from open_clip.modified_resnet import ModifiedResNet as TheirResNet
from safetensors.torch import save_file
from torch import Tensor, nn

VISION = VisionConfig(image_size=64, layers=(1, 2, 1, 1), width=16, head_width=64)
TEXT = TextConfig(width=32, heads=2, layers=1)
TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def scatter(model: nn.Module) -> None:
    """Norms away from their start, whose zeros and ones would hide a mix-up."""
    torch.manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 1.5)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("training", [False, True])
def test_features_and_gradients_are_open_clips(
    dtype: torch.dtype, tolerance: float, training: bool
) -> None:
    theirs = TheirResNet(list(VISION.layers), 24, heads=8, image_size=64, width=16)
    scatter(theirs)
    ours = ModifiedResNet(VISION, 24)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are theirs
    ours, theirs = ours.to(dtype).train(training), theirs.to(dtype).train(training)
    if training and dtype == torch.float32:
        tolerance *= 10  # statistics of few images carry roundings on; float64 tells the rest
    result, expected = ours(images(dtype)), theirs(images(dtype))
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        result.square().sum().backward()
        expected.square().sum().backward()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_directories_load_in_both_directions(tmp_path: Path) -> None:
    config = ModelConfig(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT)
    model = CLIP(config).eval()
    scatter(model)
    save_model(tmp_path / "ours", model, Preprocess(64))
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    expected = model.encode_image(images())
    torch.testing.assert_close(theirs.encode_image(images()), expected, rtol=1e-5, atol=1e-5)

    (tmp_path / "theirs").mkdir()
    written = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())
    del written["provenance"]
    written["model_cfg"]["vision_cfg"]["patch_size"] = None  # as RN50.json has it
    (tmp_path / "theirs" / "open_clip_config.json").write_text(json.dumps(written))
    save_file(theirs.state_dict(), tmp_path / "theirs" / "open_clip_model.safetensors")
    again = load_model(tmp_path / "theirs").model
    assert torch.equal(again.encode_image(images()), expected)
    pre = again.encode_image_pre(images())
    assert pre.shape == (3, 16 * 32)
    assert torch.equal(again.visual.attnpool.c_proj(pre), expected)


def test_locked_as_a_whole() -> None:
    tower = ModifiedResNet(VISION, 24)
    with pytest.raises(ModelError, match="as a whole"):
        tower.lock(1)
    tower.lock()
    assert not any(p.requires_grad for p in tower.parameters())
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.train()(images())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ModelError, match="this tower takes"):
        ModifiedResNet(VISION, 24)(torch.zeros(1, 3, 32, 32))
