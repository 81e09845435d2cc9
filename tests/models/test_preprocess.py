"""The image transforms against open_clip's."""

import io

import numpy as np
import pytest
import torch
from clip_models import ImageError, Preprocess
from clip_models.config import PreprocessConfig
from clip_models.preprocess import _random_box  # pyright: ignore[reportPrivateUsage]
from open_clip.transform import image_transform
from PIL import Image


def picture(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (97, 64), (64, 131), (33, 20), (300, 7), (224, 225)])
def test_eval_is_open_clips(resize_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    data = picture(*size)
    preprocess = Preprocess(
        64, PreprocessConfig(resize_mode=resize_mode, interpolation=interpolation)
    )
    theirs = image_transform(
        64, is_train=False, resize_mode=resize_mode, interpolation=interpolation
    )
    with Image.open(io.BytesIO(data)) as image:
        expected = theirs(image)
    ours = preprocess.normalize(preprocess.eval(data)[None])[0]
    assert ours.shape == (3, 64, 64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "1")]
)
def test_every_mode_becomes_rgb(kind: str, mode: str) -> None:
    assert Preprocess(32).eval(picture(40, 50, kind, mode)).shape == (3, 32, 32)


def test_transparent_palettes_keep_their_colours() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 10]))
    assert Preprocess(8).eval(buffer.getvalue())[:, 0, 0].tolist() == [0, 0, 255]


def test_train_depends_on_the_seed_alone() -> None:
    data, preprocess = picture(90, 120), Preprocess(64)
    first = preprocess.train(data, 7)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 64, 64)
    assert torch.equal(first, preprocess.train(data, 7))
    assert not torch.equal(first, preprocess.train(data, 8))


def test_random_boxes_have_the_area_and_aspect_of_random_resized_crop() -> None:
    import random

    rng = random.Random(0)
    boxes = [_random_box(400, 320, rng) for _ in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 320
        assert 0.89 < (right - left) * (bottom - top) / (400 * 320) <= 1
    assert len(set(boxes)) > 1000
    assert _random_box(1000, 10, rng) == (493, 0, 506, 10)  # too flat for any draw: the centre


@pytest.mark.parametrize("data", [b"", b"<html>no image</html>", picture(50, 50)[:300]])
def test_broken_bytes_are_named(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a readable image"):
        Preprocess(32).eval(data)


def test_a_bomb_is_refused_by_its_header() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="20000 x 6000 pixels"):
        Preprocess(32).eval(buffer.getvalue())


def test_hash_tells_transforms_apart() -> None:
    hashes = {Preprocess(32).hash, Preprocess(64).hash}
    hashes.add(Preprocess(64, PreprocessConfig(resize_mode="squash")).hash)
    assert len(hashes) == 3
    assert Preprocess(32).hash == Preprocess(32).hash
