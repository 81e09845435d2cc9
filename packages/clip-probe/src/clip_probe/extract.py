"""Images to features: decoded in loader workers, encoded in batches on the model's device."""

# n images of a block, B batch, S image size, D features

import sys
from collections.abc import Generator, Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from clip_models import LoadedModel, ModelError, Preprocess
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_probe import processes
from clip_probe.cache import Block
from clip_probe.datasets import Split
from clip_probe.errors import ProbeError

Feature = Literal["post", "pre", "pixels"]
Precision = Literal["fp32", "bf16"]
MAX_FAILED = 0.05
BLOCK = 512  # images; what an interruption may cost


def extract(
    model: LoadedModel,
    split: Split,
    todo: Mapping[int, Sequence[Feature]],
    *,
    batch_size: int,
    workers: int,
    precision: Precision,
) -> Generator[tuple[int, dict[Feature, Block]]]:
    """Encode blocks of a split, each for its kinds of feature; yields them in order.

    A batch never holds images of two blocks, so that a block does not depend on those before it.

    Raises:
        ProbeError: too many images cannot be decoded, or a feature is not finite.
    """
    device = model.model.logit_scale.device
    images = {
        block: range(len(split.samples))[block * BLOCK : (block + 1) * BLOCK] for block in todo
    }
    batches = [
        (block, list(numbers[start : start + batch_size]))
        for block, numbers in images.items()
        for start in range(0, len(numbers), batch_size)
    ]
    loader = DataLoader(
        _Pixels(split, model.preprocess),
        batch_sampler=[numbers for _, numbers in batches],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    total, title = sum(map(len, images.values())), title_of(split)
    bad: list[str] = []
    quiet = True if processes.rank() else None  # None: only on a terminal
    with (
        tqdm(total=total, desc=title, unit="img", file=sys.stderr, disable=quiet) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        read = zip(batches, loader, strict=True)
        for block, group in groupby(read, key=lambda pair: pair[0][0]):
            kept: list[int] = []
            failures: list[str] = []
            rows: dict[Feature, list[Tensor]] = {kind: [] for kind in todo[block]}
            for _, (numbers, pixels_B3SS, broken) in group:
                kept += numbers
                failures += broken
                check_failures(split, bad := bad + broken)
                for kind, batch in rows.items() if numbers else ():
                    features_BD = _features(model, kind, pixels_B3SS.to(device, non_blocking=True))
                    _check_finite(features_BD, kind, split, numbers, model)
                    batch.append(features_BD)
                bar.update(len(numbers) + len(broken))
            yield (
                block,
                {
                    # torch.cat later skips what has no width, where no image could be decoded
                    kind: Block(kept, torch.cat(batch) if batch else torch.empty(0), failures)
                    for kind, batch in rows.items()
                },
            )


def title_of(split: Split) -> str:
    """What progress and messages call a split."""
    return f"{split.set_name}/{split.name}"


def check_failures(split: Split, failures: Sequence[str]) -> None:
    """Raises: ProbeError: more than 5% of the split's images could not be decoded."""
    if len(failures) > MAX_FAILED * len(split.samples):
        raise ProbeError(
            f"{title_of(split)}: {len(failures)} images so far cannot be decoded, of "
            f"{len(split.samples)} (limit {MAX_FAILED:.0%}); the first: {failures[0]}"
        )


@torch.inference_mode()
def _features(model: LoadedModel, kind: Feature, pixels_B3SS: Tensor) -> Tensor:
    images_B3SS = model.preprocess.normalize(pixels_B3SS)
    if kind == "post":
        return model.model.encode_image(images_B3SS).float().cpu()
    if kind == "pre":
        return model.model.encode_image_pre(images_B3SS).float().cpu()
    return images_B3SS.flatten(1).cpu()


def _check_finite(
    features_BD: Tensor, kind: Feature, split: Split, numbers: list[int], model: LoadedModel
) -> None:
    finite_B = features_BD.isfinite().all(dim=1).tolist()
    if not all(finite_B):
        key = split.samples[numbers[finite_B.index(False)]].key
        raise ProbeError(
            f"{title_of(split)}: the {kind!r} features of image {key!r} are not finite (NaN or "
            f"infinity): check the weights of {model.path}"
        )


class _Pixels(Dataset[tuple[int, Tensor | str]]):
    """(number, uint8 [3, S, S]), or (number, why not) where the image is corrupt."""

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        self.split = split
        self.preprocess = preprocess

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, self.preprocess.eval(self.split.read(number))
        except ModelError as error:
            return number, f"{self.split.samples[number].key}: {error}"


def _collate(rows: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, list[str]]:
    """(numbers of the decoded images, their pixels uint8 [B, 3, S, S], why others failed)."""
    decoded = [(number, pixels) for number, pixels in rows if isinstance(pixels, Tensor)]
    pixels_B3SS = torch.stack([pixels for _, pixels in decoded]) if decoded else torch.empty(0)
    failures = [reason for _, reason in rows if isinstance(reason, str)]
    return [number for number, _ in decoded], pixels_B3SS, failures
