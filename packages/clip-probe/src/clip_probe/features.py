"""One pass over the images of a split: decoded in workers, encoded on the model's device."""

# N images, B batch, S image size, D features

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from clip_models import LoadedModel, ModelError, Preprocess
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_probe.datasets import Split
from clip_probe.errors import ProbeError

Feature = Literal["post", "pre", "pixels"]
MAX_FAILED = 0.05


@dataclass(frozen=True)
class Encoded:
    """Features of the images that could be decoded, in shard order, on the CPU."""

    features: dict[Feature, Tensor]  # each [N, D] float32, not normalised
    labels: Tensor  # [N] int64
    failed: int  # images left out because they could not be decoded


def encode(
    model: LoadedModel,
    split: Split,
    kinds: Sequence[Feature] = ("post",),
    *,
    batch_size: int = 64,
    workers: int = 2,
) -> Encoded:
    """Encode a split once for all `kinds` of feature.

    "post" is the image embedding, "pre" the tower's output before its projection, "pixels" the
    normalised pixels of the model's own transform, flattened: D = 3 S^2, large unless S is small.

    Raises:
        ProbeError: more than 5% of the images cannot be decoded, or a feature is not finite.
    """
    device = model.model.logit_scale.device
    loader = DataLoader(
        _Pixels(split, model.preprocess),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    collected: dict[Feature, list[Tensor]] = {kind: [] for kind in kinds}
    kept: list[int] = []
    failed: list[str] = []
    title = f"{split.path.name}/{split.name}"
    with tqdm(
        total=len(split.samples), desc=title, unit="img", file=sys.stderr, disable=None
    ) as bar:
        for indices, pixels_B3SS, failures in loader:
            failed += failures
            if len(failed) > MAX_FAILED * len(split.samples):
                raise ProbeError(
                    f"{title}: {len(failed)} images so far cannot be decoded, of "
                    f"{len(split.samples)} (limit {MAX_FAILED:.0%}); the first: {failed[0]}"
                )
            kept += indices
            for kind, batches in collected.items() if indices else ():
                features_BD = _features(model, kind, pixels_B3SS.to(device, non_blocking=True))
                finite_B = features_BD.isfinite().all(dim=1).tolist()
                if not all(finite_B):
                    key = split.samples[indices[finite_B.index(False)]].key
                    raise ProbeError(
                        f"{title}: the {kind!r} features of image {key!r} are not finite (NaN or "
                        f"infinity): check the weights of {model.path}"
                    )
                batches.append(features_BD)
            bar.update(len(indices) + len(failures))
    labels = torch.tensor(split.labels)[kept]
    return Encoded({kind: torch.cat(b) for kind, b in collected.items()}, labels, len(failed))


@torch.inference_mode()
def _features(model: LoadedModel, kind: Feature, pixels_B3SS: Tensor) -> Tensor:
    images_B3SS = model.preprocess.normalize(pixels_B3SS)
    if kind == "post":
        return model.model.encode_image(images_B3SS).float().cpu()
    if kind == "pre":
        return model.model.encode_image_pre(images_B3SS).float().cpu()
    return images_B3SS.flatten(1).cpu()


class _Pixels(Dataset[tuple[int, Tensor | str]]):
    """(index, uint8 [3, S, S]), or (index, why not) where the image is corrupt."""

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        self.split = split
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.preprocess.eval(self.split.read(index))
        except ModelError as error:
            return index, f"{self.split.samples[index].key}: {error}"


def _collate(rows: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, list[str]]:
    """(indices of the decoded images, their pixels uint8 [B, 3, S, S], why others failed)."""
    decoded = [(index, pixels) for index, pixels in rows if isinstance(pixels, Tensor)]
    pixels_B3SS = torch.stack([pixels for _, pixels in decoded]) if decoded else torch.empty(0)
    failures = [reason for _, reason in rows if isinstance(reason, str)]
    return [index for index, _ in decoded], pixels_B3SS, failures
