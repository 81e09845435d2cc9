"""The features of a split: from the cache where they are, else from one pass over the images.

With a cache each block of images is kept as it is done, so that a later task decodes nothing, an
interrupted pass continues, and several processes share the work.
"""

# N images, C classes, D features

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from clip_models import LoadedModel, load_model
from torch import Tensor

from clip_probe import processes
from clip_probe.cache import Block, FeatureCache
from clip_probe.datasets import Split, open_split
from clip_probe.errors import ProbeError
from clip_probe.extract import BLOCK, Feature, Precision, check_failures, extract


class EncodeOptions(TypedDict, total=False):
    """How images are read and encoded: what every task hands on to `encode`."""

    batch_size: int
    workers: int
    cache: Path | None
    precision: Precision


@dataclass(frozen=True)
class Encoded:
    """Features of the images that could be decoded, in shard order, on the CPU."""

    features: dict[Feature, Tensor]  # each [N, D] float32, not normalised
    labels: Tensor  # [N] int64; of a multi-label set [N, C] bool
    failed: int  # images left out because they could not be decoded
    kept: list[int]  # N numbers of samples in the split


def encode(
    model: LoadedModel,
    split: Split,
    kinds: Sequence[Feature] = ("post",),
    *,
    batch_size: int = 64,
    workers: int = 2,
    cache: Path | None = None,
    precision: Precision = "fp32",
) -> Encoded:
    """Encode a split once for all `kinds` of feature.

    "post" is the image embedding, "pre" the tower's output before its projection, "pixels" the
    normalised pixels of the model's own transform, flattened: D = 3 S^2, large unless S is small,
    and never cached.

    Raises:
        ProbeError: more than 5% of the images cannot be decoded, a feature is not finite, a cached
            block is damaged, or there are several processes and no cache.
    """
    how = {"batch_size": batch_size, "workers": workers, "precision": precision}
    blocks = range(-(-len(split.samples) // BLOCK))
    stored = _open(cache, model, split, precision) if cache else None
    if processes.count() > 1:
        if stored is None:
            raise ProbeError("several processes meet in the feature cache: give it with --cache")
        todo = _missing(stored, blocks, [kind for kind in kinds if kind != "pixels"])
        _encode_together(model, split, todo, {"cache": str(cache), **how})
    done: dict[int, dict[Feature, Block]] = {}
    todo = _missing(stored, blocks, kinds)
    for number, fresh in extract(
        model, split, todo, batch_size=batch_size, workers=workers, precision=precision
    ):
        _keep(stored, number, fresh)
        done[number] = fresh
    parts: dict[Feature, list[Block]] = {
        kind: [
            done[n][kind] if kind in done.get(n, {}) or not stored else stored.read(kind, n)
            for n in blocks
        ]
        for kind in kinds
    }
    first = parts[kinds[0]]
    failures = [failure for block in first for failure in block.failures]
    check_failures(split, failures)
    kept = [number for block in first for number in block.kept]
    return Encoded(
        {kind: torch.cat([block.features for block in some]) for kind, some in parts.items()},
        _labels(split, kept),
        len(failures),
        kept,
    )


def serve() -> None:
    """Encode for the first process until it has no more orders."""
    model: LoadedModel | None = None
    while (order := processes.receive()) is not None:
        if model is None or str(model.path) != order["model"]:
            model = load_model(order["model"], place(order["device"]))
        data = open_split(
            Path(order["source"]), order["split"], class_names=order["names"], multilabel=True
        )
        processes.exchange(_do_share(model, data, order))


def place(kind: str) -> str:
    """The device of this process: of several, each takes the GPU of its number on its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind


def _open(cache: Path, model: LoadedModel, split: Split, precision: Precision) -> FeatureCache:
    about = {
        "fingerprint": model.fingerprint,
        "model": model.config.to_dict(),  # which says more than the weights: the activation
        "transform": model.preprocess.hash,
        "precision": precision,
        "shards": split.content,
        "block": BLOCK,
    }
    return FeatureCache(cache, about)


def _missing(
    stored: FeatureCache | None, blocks: Sequence[int], kinds: Sequence[Feature]
) -> dict[int, list[Feature]]:
    """The kinds that each block lacks, where it lacks any."""
    lacking: dict[int, list[Feature]] = {
        number: [kind for kind in kinds if stored is None or not stored.has(kind, number)]
        for number in blocks
    }
    return {number: some for number, some in lacking.items() if some}


def _keep(stored: FeatureCache | None, number: int, fresh: Mapping[Feature, Block]) -> None:
    for kind, block in fresh.items():
        if stored and kind != "pixels":
            stored.write(kind, number, block)


def _encode_together(
    model: LoadedModel, split: Split, todo: dict[int, list[Feature]], how: dict[str, Any]
) -> None:
    """Fill the cache: each process takes every n-th block that is missing."""
    order = {
        "model": str(model.path),
        "device": model.model.logit_scale.device.type,
        "source": split.source,
        "split": split.name,
        "names": split.names_from,
        "todo": list(todo.items()),
        **how,
    }
    processes.send(order)
    for problem in processes.exchange(_do_share(model, split, order)):
        if problem:
            raise ProbeError(problem)


def _do_share(model: LoadedModel, split: Split, order: dict[str, Any]) -> str:
    """Encode this process's share of an order into the cache; what went wrong, or ''."""
    stored = _open(Path(order["cache"]), model, split, order["precision"])
    share = dict(order["todo"][processes.rank() :: processes.count()])
    how = {name: order[name] for name in ("batch_size", "workers", "precision")}
    try:
        for number, fresh in extract(model, split, share, **how):
            _keep(stored, number, fresh)
    except (ProbeError, OSError) as error:
        return str(error)
    return ""


def _labels(split: Split, kept: list[int]) -> Tensor:
    if not split.multilabel:
        return torch.tensor(split.labels)[kept]
    labels_NC = torch.zeros(len(kept), len(split.class_names), dtype=torch.bool)
    for row, number in enumerate(kept):
        labels_NC[row, list(split.samples[number].labels)] = True
    return labels_NC
