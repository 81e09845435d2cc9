"""The image transforms against open_clip's."""

import io
import random
from functools import cache

import clip_models
import numpy as np
import pytest
import torch
from clip_models import CLIP, ImageError, Preprocess
from clip_models.config import PreprocessConfig
from clip_models.preprocess import _random_box  # pyright: ignore[reportPrivateUsage]
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

SIZES = [(480, 360), (360, 480), (640, 427), (224, 225), (97, 64), (64, 131), (33, 20), (300, 7)]


@cache
def picture(width: int, height: int, grain: float = 0, kind: str = "PNG") -> bytes:
    """Smooth shapes as of a photograph, and grain of this contrast upon them."""
    rng = np.random.default_rng(width * 1000 + height)
    pixels = np.zeros((height, width, 3))
    for cells, contrast in ((4, 60), (16, 35), (64, 15)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32) * contrast
        for channel in range(3):
            plane = Image.fromarray(coarse[:, :, channel])
            pixels[:, :, channel] += plane.resize((width, height), Image.Resampling.BICUBIC)
    pixels += 128 + rng.standard_normal((height, width, 1)) * grain
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def assert_close_in_levels(ours: Tensor, theirs: Tensor) -> None:
    """The bounds that preprocess.py promises, in levels of 255."""
    difference = (ours.double() - theirs.double()).abs()
    assert difference.max() < 2.01
    assert (difference > 1.01).double().mean() < 1e-4
    assert difference.mean() < 0.05


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_eval_is_open_clips(resize_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    config = PreprocessConfig(resize_mode=resize_mode, interpolation=interpolation)
    std = torch.tensor(config.std).view(3, 1, 1)
    for side, grain in ((64, 0), (224, 10), (64, 300)):  # the last is noise with hard edges
        preprocess = Preprocess(side, config)
        transform = image_transform(
            side, is_train=False, resize_mode=resize_mode, interpolation=interpolation
        )
        data = picture(*size, grain)
        ours = preprocess.normalize(preprocess.eval(data)[None])[0]
        assert ours.shape == (3, side, side)
        assert_close_in_levels(ours * 255 * std, transform(opened(data)) * 255 * std)


def test_untouched_sizes_are_exact() -> None:
    data = picture(64, 64, 10)
    preprocess = Preprocess(64)
    expected = image_transform(64, is_train=False)(opened(data))
    ours = preprocess.normalize(preprocess.eval(data)[None])[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_train_is_a_crop_resized_as_pil_does(size: tuple[int, int]) -> None:
    for seed in range(4):
        data = picture(*size, 10, "JPEG" if seed % 2 else "PNG")
        box = _random_box(*size, random.Random(seed))
        resized = opened(data).crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        assert_close_in_levels(Preprocess(224).train(data, seed), theirs)


def test_features_are_those_of_open_clips_pixels() -> None:
    torch.manual_seed(0)
    model = CLIP(clip_models.architecture("XS")).eval()
    size = model.config.vision_cfg.image_size
    preprocess, transform = Preprocess(size), image_transform(size, is_train=False)
    files = [picture(300 + 20 * n, 240, 10, "JPEG") for n in range(8)]
    ours = preprocess.normalize(torch.stack([preprocess.eval(data) for data in files]))
    theirs = torch.stack([transform(opened(data)) for data in files])
    with torch.inference_mode():
        features_BE = model.encode_image(ours, normalize=True)
        expected_BE = model.encode_image(theirs, normalize=True)
    assert (features_BE * expected_BE).sum(dim=1).min() > 1 - 1e-5


def test_train_depends_on_the_seed_alone() -> None:
    data, preprocess = picture(90, 120), Preprocess(64)
    first = preprocess.train(data, 7)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 64, 64)
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, Preprocess(64).train(data, 7))
    assert not torch.equal(first, preprocess.train(data, 8))


def test_random_boxes_have_the_area_and_aspect_of_random_resized_crop() -> None:
    rng = random.Random(0)
    boxes = [_random_box(400, 320, rng) for _ in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 320
        assert 0.89 < (right - left) * (bottom - top) / (400 * 320) <= 1
    assert len(set(boxes)) > 1000
    assert _random_box(1000, 10, rng) == (493, 0, 506, 10)  # too flat for any draw: the centre


def test_the_transform_sees_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = opened(picture(80, 50))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = image_transform(40, is_train=False)(upright)
    preprocess = Preprocess(40)
    ours = preprocess.normalize(preprocess.eval(buffer.getvalue())[None])[0]
    assert (ours - expected).abs().max() < 2 / 255 / 0.25


@pytest.mark.parametrize("data", [b"", b"<html>no image</html>", picture(50, 50)[:300]])
def test_broken_bytes_are_named(data: bytes) -> None:
    for transform in (Preprocess(32).eval, lambda data: Preprocess(32).train(data, 0)):
        with pytest.raises(ImageError, match="not a readable image"):
            transform(data)


def test_a_line_is_not_blown_up_to_gigabytes() -> None:
    buffer = io.BytesIO()
    Image.new("L", (60_000, 1)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="resized image of 13440000 x 224 pixels"):
        Preprocess(224).eval(buffer.getvalue())
    assert Preprocess(224).train(buffer.getvalue(), 0).shape == (3, 224, 224)


def test_normalize_is_a_mean_and_a_deviation() -> None:
    preprocess = Preprocess(16, PreprocessConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(5, 3, 16, 16)
    before = images.clone()
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
        for v in (preprocess.config.mean, preprocess.config.std)
    )
    for given in (images, images.contiguous(), images[:0], images[1:2].transpose(2, 3)):
        normalized = preprocess.normalize(given)
        assert normalized.is_contiguous()
        expected = ((given.double() / 255 - mean) / std).float()
        torch.testing.assert_close(normalized, expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_normalize_stays_on_the_device() -> None:
    normalized = Preprocess(8).normalize(torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="meta"))
    assert normalized.device.type == "meta"
    assert normalized.dtype == torch.float32
    assert normalized.shape == (2, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_normalize_on_a_gpu_is_that_of_the_cpu() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    normalized = Preprocess(32).normalize(images.cuda())
    assert normalized.is_cuda
    torch.testing.assert_close(
        normalized.cpu(), Preprocess(32).normalize(images), rtol=0, atol=1e-6
    )


def test_hash_tells_transforms_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {Preprocess(32).hash, Preprocess(64).hash}
    hashes.add(Preprocess(64, PreprocessConfig(resize_mode="squash")).hash)
    assert len(hashes) == 3
    assert Preprocess(32).hash == Preprocess(32).hash
    monkeypatch.setattr("clip_models.preprocess.PIXELS_VERSION", 1)
    assert Preprocess(32).hash not in hashes
