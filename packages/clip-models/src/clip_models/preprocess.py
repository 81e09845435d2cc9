"""Image bytes to model input: open_clip's transforms.

The work is split where it is cheapest: `eval` and `train` run in loader workers and return uint8
pixels, a quarter of the bytes of float32; `normalize` runs on the batch, on its device.

Decoding is PIL's, bit for bit (decode.py has the outcomes of unusual files). Resizing is torch's
antialiased uint8 kernel: PIL's filters and roundings with weights of 16 bits instead of 32. About
one value in 200 is one level of 255 off PIL's, so that a normalised one is within 1 / 255 / std of
open_clip's. A few in a million are two levels off: bicubic weights can double what the first of the
two passes rounded otherwise. The mean difference is below 0.05 levels.

Nothing here uses torch's thread pool, so that processes side by side do not disturb each other.
"""

# B batch, S image size, H, W height and width in pixels

import hashlib
import json
import math
import random
from dataclasses import asdict
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clip_models.config import PreprocessConfig
from clip_models.decode import check_size, decode_image

# Raise this when the pixels of `eval` change: features made before cannot be mixed with new ones.
PIXELS_VERSION = 2

Filter = Literal["bicubic", "bilinear"]


class Preprocess:
    """A model's own image transform.

    Attributes:
        size: S, the side of the square that the image tower takes, in pixels.
        config: mean, std, interpolation and resize mode.
    """

    def __init__(self, size: int, config: PreprocessConfig | None = None) -> None:
        self.size = size
        self.config = config or PreprocessConfig()
        # open_clip's "random" is for training; it evaluates with bicubic
        bilinear = self.config.interpolation == "bilinear"
        self._filter: Filter = "bilinear" if bilinear else "bicubic"

    @property
    def hash(self) -> str:
        """Identifies the evaluation transform: equal hashes give equal pixels."""
        text = json.dumps([PIXELS_VERSION, self.size, asdict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def eval(self, data: bytes) -> Tensor:
        """Encoded image -> uint8 [3, S, S]: resize by the resize mode, then crop the centre.

        Raises:
            ImageError: the bytes are no complete image, or one above 100 million pixels, as it is
                or as its short side becomes S.
        """
        pixels_HW3, size = decode_image(data), self.size
        height, width = pixels_HW3.shape[:2]
        if self.config.resize_mode == "squash":
            return _planar(_resize(pixels_HW3, size, size, self._filter))
        if self.config.resize_mode == "longest":
            scale = size / max(width, height)
            w, h = max(1, round(width * scale)), max(1, round(height * scale))
            left, top = (size - w) // 2, (size - h) // 2
            padded_SS3 = np.zeros((size, size, 3), np.uint8)
            fitted = _resize(pixels_HW3, w, h, self._filter)
            padded_SS3[top : top + h, left : left + w] = fitted
            return _planar(padded_SS3)
        # torchvision's Resize(int): the short side becomes S, the long one is truncated
        long = int(size * max(width, height) / min(width, height))
        w, h = (size, long) if width <= height else (long, size)
        resized = _resize(pixels_HW3, w, h, self._filter)
        left, top = round((w - size) / 2), round((h - size) / 2)
        return _planar(resized[top : top + size, left : left + size])

    def train(self, data: bytes, seed: int) -> Tensor:
        """Encoded image -> uint8 [3, S, S]: a random crop of 90-100% of the area, resized bicubic.

        The paper's only augmentation: torchvision's RandomResizedCrop(scale=(0.9, 1.0)). The crop
        depends on nothing but `seed`.

        Raises:
            ImageError: as in `eval`.
        """
        pixels_HW3 = decode_image(data)
        height, width = pixels_HW3.shape[:2]
        left, top, right, bottom = _random_box(width, height, random.Random(seed))
        cropped = np.ascontiguousarray(pixels_HW3[top:bottom, left:right])
        return _planar(_resize(cropped, self.size, self.size, "bicubic"))

    def normalize(self, images_B3SS: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 (x / 255 - mean) / std, on the same device."""
        scale_311, bias_311 = _affine(self.config.mean, self.config.std, images_B3SS.device)
        if images_B3SS.device.type != "cpu":
            return torch.addcmul(bias_311, images_B3SS.float(), scale_311)
        # One image at a time stays in the cache. NumPy asks the kernel for huge pages; torch does
        # not, and the first touches of a new batch would take longer than the arithmetic.
        scale, bias = scale_311.numpy(), bias_311.numpy()
        out_B3SS = np.empty(images_B3SS.shape, np.float32)
        for image_3SS, out_3SS in zip(images_B3SS.numpy(), out_B3SS, strict=True):
            np.multiply(image_3SS, scale, out=out_3SS)
            out_3SS += bias
        return torch.from_numpy(out_B3SS)


@lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """scale, bias [3, 1, 1] float32 such that x * scale + bias = (x / 255 - mean) / std."""
    mean_311, std_311 = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    scale, bias = 1 / (255 * std_311), -mean_311 / std_311
    return scale.float().to(device), bias.float().to(device)


def _resize(pixels_HW3: NDArray[np.uint8], w: int, h: int, mode: Filter) -> NDArray[np.uint8]:
    """PIL's `resize` to [h, w, 3], but for the roundings that the module tells of."""
    check_size(w, h, "resized image")  # a line of 60,000 x 1 would grow to gigabytes
    height, width = pixels_HW3.shape[:2]
    # [None] first: only then are the strides those that torch calls channels-last, its fast path
    images_13HW = torch.from_numpy(pixels_HW3)[None].permute(0, 3, 1, 2)
    # Each pass rounds to whole levels, so their order shows. Torch goes along the rows first;
    # Pillow 13 does not where that is much more work.
    if height - h > max(0, 2 * (width - w)):
        images_13HW = F.interpolate(images_13HW, (h, width), mode=mode, antialias=True)
    resized_13hw = F.interpolate(images_13HW, (h, w), mode=mode, antialias=True)
    return resized_13hw[0].permute(1, 2, 0).numpy()


def _planar(pixels_SS3: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels_SS3.transpose(2, 0, 1)))


def _random_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop's draw: area 0.9-1.0, aspect 3/4-4/3; left, top, right, bottom."""
    for _ in range(10):
        area = width * height * rng.uniform(0.9, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    # no draw fitted: the whole image, or its centre where the aspect is out of range
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
