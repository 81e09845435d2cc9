"""Batches by step number: the same bytes for any number of loader processes."""

# b batch of this process, S image size, L context length

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from clip_models import HFTokenizer, ImageError, Preprocess, Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_train.errors import TrainError
from clip_train.order import Stream, derive_seed
from clip_train.shards import Shard, open_shard

MAX_REPLACED = 100  # unreadable samples in a row after which the disk, not a sample, is broken
STALLED = 300  # seconds without a batch after which the loader gives up


class Batch(NamedTuple):
    """One process's share of a global batch."""

    images_b3SS: Tensor  # uint8
    tokens_bL: Tensor  # int64
    unreadable: list[str]  # one line for each sample that was replaced
    failure: str | None = None  # why there is no batch: errors cross processes as text


class Batches(Dataset[Batch]):
    """Process `rank`'s share of the global batch at each step: a contiguous slice of the stream.

    An unreadable sample is replaced by the one at its place in the next batch, so that no batch
    holds a sample twice; if that fails too, in the batch after, and so on.
    """

    def __init__(
        self,
        shards: list[Path],
        order: Stream,
        preprocess: Preprocess,
        tokenizer: Tokenizer | HFTokenizer,
        *,
        batch_size: int,
        rank: int,
        world: int,
        first: tuple[int, int] = (0, 0),
    ) -> None:
        """Where the stream and this process stand.

        Args:
            batch_size: of all `world` processes together, a multiple of it.
            first: a step, and the place in the stream at which its batch starts.
        """
        self.shards = shards
        self.order = order
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.rank = rank
        self.share = batch_size // world
        self.first = first
        self._broken: dict[int, str] = {}  # shards that are no tars, and why

    def start(self, step: int) -> int:
        """The place in the stream at which the global batch of a step starts."""
        first_step, first_place = self.first
        return first_place + (step - first_step) * self.batch_size

    def names(self, step: int) -> list[str]:
        """The samples of a step's global batch, as messages call them."""
        start = self.start(step)
        places = map(self.order.place, self.order.samples(start, start + self.batch_size).tolist())
        return [self._name(number, row) for number, row in places]

    def __getitem__(self, step: int) -> Batch:
        images: list[Tensor] = []
        captions: list[str] = []
        unreadable: list[str] = []
        start = self.start(step) + self.rank * self.share
        try:
            for position in range(start, start + self.share):
                image, caption = self._pair(position, unreadable)
                images.append(image)
                captions.append(caption)
        except TrainError as error:
            nothing = torch.empty(0)
            return Batch(nothing, nothing, unreadable, failure=str(error))
        return Batch(torch.stack(images), self.tokenizer(captions), unreadable)

    def _pair(self, position: int, unreadable: list[str]) -> tuple[Tensor, str]:
        """The image [3, S, S] and caption at a stream position; failed attempts are noted."""
        seed = derive_seed(self.order.seed, position)
        for attempt in range(MAX_REPLACED):
            place = position + attempt * self.batch_size
            number, row = self.order.place(int(self.order.samples(place, place + 1)[0]))
            shard = self._open(number)
            if isinstance(shard, str):
                unreadable.append(f"{self._name(number, row)}: {shard}")
                continue
            try:
                image = self.preprocess.train(shard.image(row), seed)
                return image, choose_caption(shard.caption(row), seed)
            except (TrainError, ImageError, OSError, UnicodeDecodeError) as error:
                unreadable.append(f"{shard.name(row)}: {error}")
        raise TrainError(f"{MAX_REPLACED} unreadable samples in a row, the last {unreadable[-1]}")

    def _name(self, number: int, row: int) -> str:
        shard, path = self._open(number), self.shards[number]
        if isinstance(shard, Shard):
            return shard.name(row)
        return f"{path.parent.name}/{path.name}/row {row}"  # its key is in there

    def _open(self, number: int) -> Shard | str:
        """A shard, or why it cannot be read, which makes all its samples unreadable.

        Raises:
            TrainError: it is another than was counted.
        """
        if number in self._broken:
            return self._broken[number]
        try:
            shard = open_shard(self.shards[number])
        except OSError as error:  # the next attempt may succeed
            return str(error)
        except TrainError as error:
            return self._broken.setdefault(number, str(error))
        if len(shard) != self.order.counts[number]:
            raise TrainError(
                f"{shard.path}: holds {len(shard)} samples, sizes.json says "
                f"{self.order.counts[number]}; build it again: clip-data build"
            )
        return shard


def choose_caption(text: bytes, seed: int) -> str:
    """One of the caption's lines, drawn by `seed`: sets with several captions have one a line.

    Raises:
        TrainError: there is none. UnicodeDecodeError.
    """
    lines = [line for line in text.decode().splitlines() if line.strip()]
    if not lines:
        raise TrainError("its caption is empty")
    return lines[seed % len(lines)]


def load(batches: Batches, steps: range, workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of `steps`, in order, decoded ahead by `workers` processes.

    A worker that died or does not answer is the failure of a batch, the last. The DataLoader raises
    a worker's death from its handler of SIGCHLD, whatever is being done: here that is only while a
    batch is asked for, never where processes are in step.
    """
    ahead = iter(
        DataLoader(
            batches,
            batch_size=None,  # `batches` makes whole batches
            sampler=steps,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_signals,
            timeout=STALLED if workers else 0,
        )
    )
    raising = signal.signal(signal.SIGCHLD, _hold)
    try:
        for _ in steps:
            try:
                signal.signal(signal.SIGCHLD, raising)
                if workers and callable(raising):
                    raising(signal.SIGCHLD, None)  # for one that died meanwhile
                batch = next(ahead)
                signal.signal(signal.SIGCHLD, _hold)
            # The last two: a worker died between naming a batch and handing it over.
            except (RuntimeError, OSError, EOFError) as error:
                signal.signal(signal.SIGCHLD, _hold)
                nothing = torch.empty(0)
                failure = f"the data loader failed: {error!r}; was a worker killed, out of memory?"
                batch = Batch(nothing, nothing, [], failure=failure)
            yield batch
            if batch.failure:
                return
    finally:
        del ahead  # first: it forgets its workers, and their deaths raise no more
        signal.signal(signal.SIGCHLD, raising)


def _hold(_number: int, _frame: object) -> None:
    """Until the next batch is asked for."""


def ignore_signals(_worker: int) -> None:
    """SIGTERM and Ctrl-C reach the whole process group; when to stop is the parent's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
