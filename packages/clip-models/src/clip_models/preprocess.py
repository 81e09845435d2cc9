"""Image bytes to model input, as open_clip's transforms do it.

The work is split where it is cheapest: `eval` and `train` run in loader workers and return uint8
pixels, a quarter of the bytes of float32; `normalize` runs on the batch, on its device.
"""

# B batch, S image size

import hashlib
import io
import json
import math
import random
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_models.config import PreprocessConfig
from clip_models.errors import ImageError

MAX_PIXELS = 100_000_000  # a decompression bomb is refused by its header


def _decode(data: bytes) -> Image.Image:
    """The first frame as RGB, alpha and palette converted as PIL does (webdataset's `pilrgb`)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"image of {width} x {height} pixels; the limit is {MAX_PIXELS:,} in all"
                )
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # the same colours, without PIL's warning
            return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on broken bytes
        raise ImageError(f"not a readable image ({len(data):,} bytes): {error}") from error


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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
        self._filter = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC

    @property
    def hash(self) -> str:
        """Identifies the evaluation transform: equal hashes give equal pixels."""
        text = json.dumps([self.size, asdict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def eval(self, data: bytes) -> Tensor:
        """Encoded image -> uint8 [3, S, S]: resize by the resize mode, then crop the centre.

        Raises:
            ImageError: the bytes are no readable image, or one above 100 million pixels.
        """
        image, size = _decode(data), self.size
        width, height = image.size
        if self.config.resize_mode == "squash":
            return _to_tensor(image.resize((size, size), self._filter))
        if self.config.resize_mode == "longest":
            scale = size / max(width, height)
            fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = image.resize(fitted, self._filter)
            padded = Image.new("RGB", (size, size))
            padded.paste(image, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
            return _to_tensor(padded)
        # torchvision's Resize(int): the short side becomes S, the long one is truncated
        short, long = min(width, height), max(width, height)
        resized = int(size * long / short)
        image = image.resize((size, resized) if width <= height else (resized, size), self._filter)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return _to_tensor(image.crop((left, top, left + size, top + size)))

    def train(self, data: bytes, seed: int) -> Tensor:
        """Encoded image -> uint8 [3, S, S]: a random crop of 90-100% of the area, resized bicubic.

        The paper's only augmentation: torchvision's RandomResizedCrop(scale=(0.9, 1.0)). The crop
        depends on nothing but `seed`.

        Raises:
            ImageError: as in `eval`.
        """
        image = _decode(data)
        box = _random_box(image.width, image.height, random.Random(seed))
        size = (self.size, self.size)
        return _to_tensor(image.crop(box).resize(size, Image.Resampling.BICUBIC))

    def normalize(self, images_B3SS: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 (x / 255 - mean) / std, on the same device."""
        mean = torch.tensor(self.config.mean, device=images_B3SS.device).view(3, 1, 1)
        std = torch.tensor(self.config.std, device=images_B3SS.device).view(3, 1, 1)
        return (images_B3SS.float().div_(255)).sub_(mean).div_(std)


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
