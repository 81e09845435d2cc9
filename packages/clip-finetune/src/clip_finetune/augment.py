"""Stronger augmentation than CLIP's, from timm's parts, and as reproducible.

timm draws from Python's, NumPy's and torch's global generators; each image or batch gets them
seeded by its place in the run, and whoever else uses them finds them as they were.
"""

# B batch, S image side

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from clip_models import Preprocess, decode_image
from torch import Tensor

from clip_finetune.errors import FinetuneError


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """All three global generators from this seed, and afterwards as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


class Augment:
    """timm's training transform: crops of 8-100%, flips, and a policy such as RandAugment."""

    def __init__(self, policy: str, preprocess: Preprocess) -> None:
        """Raises: FinetuneError: timm knows no such policy."""
        from timm.data.transforms_factory import create_transform

        try:
            self._transform = cast(
                Callable[[Any], Tensor],
                create_transform(
                    preprocess.size,
                    is_training=True,
                    auto_augment=policy,
                    interpolation="bicubic",
                    mean=preprocess.config.mean,
                    normalize=False,  # uint8, as Preprocess gives
                ),
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise FinetuneError(
                f"--augment {policy!r}: timm has no such policy; e.g. rand-m9-n2-inc1, augmix-m3, "
                "original"
            ) from error

    def __call__(self, data: bytes, seed: int) -> Tensor:
        """Encoded image -> uint8 [3, S, S].

        Raises:
            ImageError: as `decode_image`.
        """
        from PIL import Image

        image = Image.fromarray(decode_image(data))
        with seeded(seed):
            return self._transform(image)


class Erase:
    """Random erasing (Zhong et al., 1708.04896) of normalised images, by noise as in timm."""

    def __init__(self, share: float, device: torch.device) -> None:
        from timm.data.random_erasing import RandomErasing

        self._erase = RandomErasing(share, mode="pixel", device=str(device))

    def __call__(self, images_B3SS: Tensor, seed: int) -> Tensor:
        """The same images, some of them with a box of noise."""
        with seeded(seed):
            return cast(Tensor, self._erase(images_B3SS))
