"""Which images make a batch, read and decoded in worker processes.

A training batch is a pure function of (seed, step): step s takes task s mod T, and reads on in
that task's own endless sequence of shuffled epochs. So a run continues anywhere in constant time,
and any number of processes sees the same global batches.
"""

import signal
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from clip_models import ImageError, Preprocess
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_finetune.errors import FinetuneError
from clip_finetune.labelled_set import LabelledSet

# T tasks or sets, B images a batch (of this process), S image side

_CORRUPT_LIMIT = 0.05  # of a set's images: beyond it the set is broken, not an image


class Batch(NamedTuple):
    """Images of one set, and how many could not be decoded on the way."""

    source: int  # which of the T tasks or sets
    images: Tensor  # [B, 3, S, S] uint8; [B, 0] where no image of the set can be decoded
    labels: Tensor  # [B] int64
    draws: Tensor  # [B] int64, a random number for each image, e.g. to choose its prompt
    corrupt: int


class TrainBatches(Dataset[Batch]):
    """`batches[step]` is this process's share of the global batch of `step`."""

    def __init__(
        self,
        tasks: Sequence[LabelledSet],
        decode: Callable[[bytes, int], Tensor],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Args: decode: encoded image and seed -> uint8 [3, S, S], as `Preprocess.train`."""
        if batch_size % world:
            raise FinetuneError(
                f"--batch-size {batch_size} does not divide among {world} processes"
            )
        self.tasks, self.decode, self.seed = tasks, decode, seed
        self.batch_size, self.rank, self.share = batch_size, rank, batch_size // world

    def __getitem__(self, step: int) -> Batch:
        task = step % len(self.tasks)
        first = step // len(self.tasks) * self.batch_size + self.rank * self.share
        rows = [self._sample(task, position) for position in range(first, first + self.share)]
        images, labels, draws, corrupt = zip(*rows, strict=True)
        columns = torch.tensor(labels), torch.tensor(draws)
        return Batch(task, torch.stack(images), *columns, sum(corrupt))

    def _sample(self, task: int, position: int) -> tuple[Tensor, int, int, int]:
        """(image, label, random number, 1 if corrupt) at `position` of the task's sequence.

        An image that cannot be decoded is replaced by the one stored after it, so that the batch
        keeps its size and the same position always gives the same image.
        """
        data = self.tasks[task]
        epoch, row = divmod(position, len(data))
        index = int(_shuffled(len(data), self.seed, task, epoch)[row])
        crop = derive_seed(self.seed, task, position)
        for skipped in range(len(data)):
            candidate = (index + skipped) % len(data)
            try:
                image = self.decode(data.read(candidate), crop)
            except ImageError:
                continue
            return image, int(data.label_N[candidate]), crop, int(skipped > 0)
        return torch.empty(0, dtype=torch.uint8), 0, crop, 1  # of all images; the run ends


def derive_seed(*key: int) -> int:
    """A seed for one purpose, told from others by its key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@lru_cache(maxsize=64)  # a batch may span two epochs of each of many tasks
def _shuffled(size: int, seed: int, task: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, task, epoch)).permutation(size)


class EvalBatches(Dataset[Batch]):
    """All images of all sets once, in order; corrupt ones are counted and left out."""

    def __init__(
        self, sets: Sequence[LabelledSet], preprocess: Preprocess, batch_size: int
    ) -> None:
        self.sets, self.preprocess = sets, preprocess
        self.spans = [
            (source, range(first, min(first + batch_size, len(data))))
            for source, data in enumerate(sets)
            for first in range(0, len(data), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Batch:
        source, span = self.spans[number]
        data = self.sets[source]
        images: list[Tensor] = []
        kept: list[int] = []
        for index in span:
            try:
                images.append(self.preprocess.eval(data.read(index)))
            except ImageError:
                continue
            kept.append(index)
        size = self.preprocess.size
        stacked = (
            torch.stack(images) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)
        )
        labels = torch.from_numpy(data.label_N[kept])
        return Batch(source, stacked, labels, torch.tensor(kept), len(span) - len(kept))


def loader(batches: Dataset[Batch], order: Sequence[int], *, workers: int) -> DataLoader[Batch]:
    """The batches in that order, made ahead of time by `workers` processes (0: in this one)."""
    return DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(_worker: int) -> None:
    """SIGTERM and Ctrl-C reach the whole process group; when to stop is the parent's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def refuse_corrupt(data: LabelledSet, corrupt: int, drawn: int) -> None:
    """Raises FinetuneError when more than 5% of the images (or of the draws) were corrupt."""
    if corrupt > _CORRUPT_LIMIT * max(len(data), drawn):
        raise FinetuneError(
            f"{data.path / data.split}: {corrupt} of {max(len(data), drawn)} images cannot be "
            f"decoded, more than {_CORRUPT_LIMIT:.0%}; check the set with clip-data verify"
        )
