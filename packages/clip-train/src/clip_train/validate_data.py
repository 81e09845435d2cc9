"""Held-out samples in their stored order: whole images, first captions, nothing drawn."""

# b samples read together, N samples of a set, S image size, L context length

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from clip_models import (
    HFTokenizer,
    ImageError,
    Preprocess,
    Tokenizer,
    read_class_names,
    read_templates,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_train.errors import TrainError
from clip_train.loader import STALLED, choose_caption, ignore_signals
from clip_train.shards import find_shards, open_shard


class Sample(NamedTuple):
    """Where a sample lies, and what messages call it."""

    shard: Path
    row: int
    name: str


@dataclass(frozen=True)
class LabelledSet:
    """One split of a set in CLIP_benchmark's layout."""

    samples: list[Sample]
    labels_N: Tensor
    class_names: list[str]
    templates: list[str]


def open_pairs(val_data: str) -> list[Sample]:
    """All samples of `--val-data`, which takes the forms of `--train-data`.

    Raises:
        TrainError: no shards, or no image-caption pair in them.
    """
    shards = find_shards(val_data, "--val-data")
    if not any(open_shard(shard).pairs() for shard in shards):
        raise TrainError(
            f"--val-data: no image-caption pair in {val_data}; build its shards: clip-data build"
        )
    return _samples(shards)


def open_labelled_set(path: str) -> LabelledSet:
    """Open SET/SPLIT, or SET for its split `test`, and read all labels.

    Raises:
        TrainError: no such set or split, no samples, a sample whose label is no class, a template
            without `{c}`. ModelError: no class names or templates.
    """
    folder = Path(path)
    split = folder / "test" if (folder / "classnames.txt").exists() else folder
    names, templates = read_class_names(split.parent), read_templates(split.parent)
    for template in templates:
        if "{c}" not in template:
            raise TrainError(f"--zeroshot-data {path}: the template {template!r} has no {{c}}")
    samples = _samples(_numbered_shards(split))
    if not samples:
        raise TrainError(f"--zeroshot-data: {split} holds no samples; build the set again")
    labels = [_label(sample, len(names)) for sample in samples]
    return LabelledSet(samples, torch.tensor(labels), names, templates)


def _numbered_shards(split: Path) -> list[Path]:
    file = split / "nshards.txt"
    count = file.read_text().strip() if file.exists() else ""
    if not count.isdecimal():
        splits = sorted(found.parent.name for found in split.parent.glob("*/nshards.txt"))
        raise TrainError(
            f"--zeroshot-data: {file} is {f'{count[:40]!r}' if file.exists() else 'missing'}; "
            f"expected the number of shards; splits found: {', '.join(splits) or 'none'}"
        )
    return [split / f"{number}.tar" for number in range(int(count))]


def _samples(shards: list[Path]) -> list[Sample]:
    opened = ((path, open_shard(path)) for path in shards)
    return [Sample(path, row, tar.name(row)) for path, tar in opened for row in range(len(tar))]


def _label(sample: Sample, classes: int) -> int:
    where = f"--zeroshot-data: {sample.shard.parent.parent / sample.name}"
    try:
        label = open_shard(sample.shard).label(sample.row)
    except TrainError as error:
        raise TrainError(f"{where}: {error}") from error
    if not 0 <= label < classes:
        raise TrainError(
            f"{where}: the label is {label}; expected 0 to {classes - 1}, a line of classnames.txt"
        )
    return label


class Read(NamedTuple):
    """Samples as the model takes them."""

    images_b3SS: Tensor  # uint8; black where a sample is unreadable
    tokens_bL: Tensor  # int64; none without a tokenizer
    readable_b: Tensor  # uint8, 1 or 0: gloo gathers no booleans
    unreadable: list[str]  # one line for each that is not


class Reader(Dataset[Read]):
    """Reads samples by lists of positions. Positions past the last begin again at the first."""

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        tokenizer: Tokenizer | HFTokenizer | None,
    ) -> None:
        """Args: tokenizer: of the first captions; None: images alone are read."""
        self.samples = samples
        self.preprocess = preprocess
        self.tokenizer = tokenizer

    def __getitem__(self, positions: list[int]) -> Read:
        images: list[Tensor] = []
        captions: list[str] = []
        readable: list[bool] = []
        unreadable: list[str] = []
        size = self.preprocess.size
        for position in positions:
            sample = self.samples[position % len(self.samples)]
            image, caption, good = torch.zeros(3, size, size, dtype=torch.uint8), "", False
            try:
                shard = open_shard(sample.shard)
                if self.tokenizer:
                    caption = choose_caption(shard.caption(sample.row), 0)
                image, good = self.preprocess.eval(shard.image(sample.row)), True
            except (TrainError, ImageError, OSError, UnicodeDecodeError) as error:
                if position < len(self.samples):  # each is named by one process
                    unreadable.append(f"{sample.name}: {error}")
            images.append(image)
            captions.append(caption)
            readable.append(good)
        tokens_bL = self.tokenizer(captions) if self.tokenizer else torch.empty(0)
        mask_b = torch.tensor(readable, dtype=torch.uint8)
        return Read(torch.stack(images), tokens_bL, mask_b, unreadable)


def read_ahead(
    reader: Reader, parts: list[list[int]], workers: int, device: torch.device
) -> Generator[Read]:
    """What `reader` finds at each list of positions, in order, decoded ahead by `workers`.

    To be closed: workers ignore SIGTERM, and one that is left keeps the process from ending.

    Raises:
        TrainError: a worker died or does not answer.
    """
    loader = DataLoader(
        reader,
        batch_size=None,  # `parts` are whole batches
        sampler=parts,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        timeout=STALLED if workers else 0,
        generator=torch.Generator(),  # not training's random numbers
    )
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as error:
        raise TrainError(f"validation: the data loader failed: {error!r}") from error
