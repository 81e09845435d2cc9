"""Pictures and captions to unit vectors, shard by shard."""

# B batch, N rows, D embedding width, S image size

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from clip_models import LoadedModel, ModelError, Preprocess
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from clip_retrieval.errors import RetrievalError
from clip_retrieval.pictures import thumbnail
from clip_retrieval.shards import Sample
from clip_retrieval.sources import Part, shard_part

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

MAX_FAILED = 0.05  # of the images; more means that something is wrong with the data, not with one
_ENOUGH = 2_000  # images seen before the share of failures stops a run early


@dataclass(frozen=True)
class Record:
    """What is kept about one picture; offset and size, in bytes, locate it in its file."""

    key: str
    caption: str | None
    json: str | None
    shard: str
    offset: int
    size: int
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Embedded:
    """One part, embedded: `embeddings_ND` are unit rows beside `records`, in the part's order."""

    shard: Path
    records: list[Record]
    embeddings_ND: Float32
    failures: list[str]  # "key: reason", one for each image that could not be read


def pick_device(name: str) -> torch.device:
    """ "auto": the GPU where there is one, else the CPU.

    Raises:
        RetrievalError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RetrievalError(f"device {name!r} is not usable ({reason}); try auto") from error
    return device


def embed_images(
    loaded: LoadedModel,
    shards: Sequence[Path | Part],
    *,
    batch_size: int = 128,
    workers: int = 2,
    thumbnails: int = 0,
) -> Iterator[Embedded]:
    """Each shard or part embedded, in the order given, the same whatever the number of workers.

    Args:
        thumbnails: longer side, in pixels, of a JPEG to keep of each picture; 0: none.

    Raises:
        RetrievalError: a broken tar, too many broken images, embeddings that are not finite.
    """
    if not shards:
        return
    device = _device(loaded)
    parts = [shard_part(shard) if isinstance(shard, Path) else shard for shard in shards]
    batches = _Batches(parts, loaded.preprocess, batch_size, thumbnails)
    # batch_size=None: the data set makes whole batches; workers take turns, so order is kept
    loader: DataLoader[_Batch | Exception] = DataLoader(
        batches, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda"
    )
    # said outright, tokenizers does not warn about the workers' fork; they never tokenize
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    records, failures, rows = list[Record](), list[str](), list[Tensor]()
    seen = failed = done = 0
    with tqdm(unit=" images", disable=None) as bar:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            if batch.records:
                pixels_B3SS = batch.images_B3SS.to(device, non_blocking=True)
                with torch.inference_mode():
                    normalized = loaded.preprocess.normalize(pixels_B3SS)
                    features = loaded.model.encode_image(normalized, normalize=True)
                rows.append(features.float().cpu())
            records += batch.records
            failures += batch.failures
            bar.update(len(batch.records))
            if not batch.last:
                continue
            shard = parts[done].path
            seen += len(records) + len(failures)
            failed += len(failures)
            if failures:
                log.warning(
                    "%s: %d of %d images could not be read; first: %s",
                    *(shard.name, len(failures), len(records) + len(failures), failures[0]),
                )
            check_failures(failed, max(seen, _ENOUGH), shard.parent)
            yield Embedded(shard, records, _stack(rows, loaded.config.embed_dim, shard), failures)
            records, failures, rows = [], [], []
            done += 1
            bar.set_description(f"{done}/{len(shards)} shards")


def embed_texts(loaded: LoadedModel, texts: Sequence[str], batch_size: int = 512) -> Float32:
    """Texts -> unit rows [N, D].

    Raises:
        RetrievalError: embeddings that are not finite.
    """
    rows = list[Tensor]()
    for start in range(0, len(texts), batch_size):
        tokens_BL = loaded.tokenizer(texts[start : start + batch_size]).to(_device(loaded))
        with torch.inference_mode():
            rows.append(loaded.model.encode_text(tokens_BL, normalize=True).float().cpu())
    return _stack(rows, loaded.config.embed_dim, "texts")


def embed_image(loaded: LoadedModel, data: bytes) -> Float32:
    """One encoded image -> a unit row [1, D].

    Raises:
        ImageError: bytes that are no readable image.
    """
    pixels_13SS = loaded.preprocess.eval(data)[None].to(_device(loaded))
    with torch.inference_mode():
        row = loaded.model.encode_image(loaded.preprocess.normalize(pixels_13SS), normalize=True)
    return _stack([row.float().cpu()], loaded.config.embed_dim, "image")


def check_failures(failed: int, seen: int, where: Path) -> None:
    """Raises RetrievalError when more than 5% of the images seen could not be read."""
    if failed > MAX_FAILED * seen:
        raise RetrievalError(
            f"{where}: {failed} of {seen} images could not be read, more than {MAX_FAILED:.0%}; "
            "repair the shards (`clip-data verify` lists what is wrong) and run this again"
        )


def _device(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device


def _stack(rows: list[Tensor], width: int, what: object) -> Float32:
    embeddings_ND = torch.cat(rows).numpy() if rows else np.zeros((0, width), np.float32)
    if not np.isfinite(embeddings_ND).all():
        raise RetrievalError(
            f"{what}: the model's embeddings are not finite numbers; its weights are broken, "
            "take an earlier model directory"
        )
    return embeddings_ND


@dataclass(frozen=True)
class _Batch:
    """Decoded pictures of one shard; `last` marks the shard's end."""

    images_B3SS: Tensor  # uint8
    records: list[Record]
    failures: list[str]
    last: bool


class _Batches(IterableDataset[_Batch | Exception]):
    """All batches of all shards; worker w of W decodes batches w, w + W, w + 2W, …

    Every worker lists every shard (cheap: headers only) and so agrees on what batch is whose.
    A batch never spans two shards. Expected failures are handed over as items: raised in a
    worker they would arrive with its traceback as their message.
    """

    def __init__(
        self, parts: Sequence[Part], preprocess: Preprocess, batch_size: int, thumbnails: int
    ) -> None:
        self.parts, self.preprocess, self.batch_size = parts, preprocess, batch_size
        self.thumbnails = thumbnails

    def __iter__(self) -> Iterator[_Batch | Exception]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turns = count()
        try:
            for part in self.parts:
                samples = part.samples()
                for start in range(0, max(len(samples), 1), self.batch_size):
                    if next(turns) % workers == worker:
                        stop = start + self.batch_size
                        yield self._decode(part, samples[start:stop], stop >= len(samples))
        except (RetrievalError, OSError) as error:
            yield error

    def _decode(self, part: Part, samples: list[Sample], last: bool) -> _Batch:
        images, records, failures = list[Tensor](), list[Record](), list[str]()
        for sample in samples:
            if sample.image is None:
                failures.append(f"{sample.key}: no image member")
                continue
            file = part.image_file(sample)
            try:
                (file + sample.key).encode()  # the metadata is UTF-8
                data = part.read(sample, sample.image_extension)
                images.append(self.preprocess.eval(data))
            except UnicodeEncodeError:
                failures.append(f"{sample.key!a} in {file!a}: a name that is not UTF-8")
                continue
            except ModelError as error:
                failures.append(f"{sample.key}: {error}")
                continue
            texts = {
                extension: part.read(sample, extension).decode(errors="replace")
                for extension in ("txt", "json")
                if extension in sample.members
            }
            caption = texts.get("txt", "").strip() or None
            shown = thumbnail(data, self.thumbnails) if self.thumbnails else None
            records.append(
                Record(sample.key, caption, texts.get("json"), file, *sample.image, shown)
            )
        size = self.preprocess.size
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size).byte()
        return _Batch(stacked, records, failures, last)
