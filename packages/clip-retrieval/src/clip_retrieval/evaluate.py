"""Zero-shot retrieval as the paper measures it: Recall@k of text -> image and image -> text.

CLIP_benchmark's definition: a query hits where any of its positives is among the k best. Ranks
are counted tile by tile, both ways from the same scores, so memory does not grow with captions x
images. Scores are summed in float64 and rounded to float32.

Equal scores go to the earlier item. CLIP_benchmark leaves them to torch.topk, whose choice is not
defined and differs between devices and values of k; where nothing ties, its numbers are these, to
the last digit of its float32. Identical pictures tie exactly here, and a model whose embeddings
have collapsed scores chance.
"""

# N images, M captions, D embedding width, Q queries; t, n tiles of captions and images

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_models import LoadedModel, load_model
from torch import Tensor

from clip_retrieval.embed import check_failures, embed_images, embed_texts, pick_device
from clip_retrieval.errors import RetrievalError
from clip_retrieval.shards import list_shards

log = logging.getLogger(__name__)

TILE_TEXTS, TILE_IMAGES = 1024, 4096  # 50 MB of scores at a time, in double and single precision


def evaluate_retrieval(
    model: Path,
    sets: Sequence[Path],
    *,
    split: str = "test",
    recall_k: Sequence[int] = (1, 5, 10),
    batch_size: int = 128,
    workers: int = 2,
    device: str = "auto",
) -> Iterator[dict[str, Any]]:
    """One result per set: a directory in CLIP_benchmark's layout, or one of training shards.

    Raises:
        RetrievalError: no pictures, a picture without a caption, too many that are broken.
    """
    where = pick_device(device)
    directories = [_find(path, split) for path in sets]
    loaded = load_model(model, where)
    for path, (directory, found_split) in zip(sets, directories, strict=True):
        images_ND, texts_MD, owner_M, failed = embed_set(
            loaded, directory, batch_size=batch_size, workers=workers
        )
        log.info("%s: %d images, %d captions", path, len(images_ND), len(texts_MD))
        yield {
            "dataset": str(path),
            "split": found_split,
            "task": "zeroshot_retrieval",
            "model": str(model),
            "fingerprint": loaded.fingerprint,
            "images": len(images_ND),
            "captions": len(texts_MD),
            "failed": failed,
            **recall(images_ND.to(where), texts_MD.to(where), owner_M.to(where), recall_k),
        }


def recall(
    images_ND: Tensor, texts_MD: Tensor, owner_M: Tensor, recall_k: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, Any]]:
    """Both directions' Recall@k, under CLIP_benchmark's names.

    Args:
        images_ND, texts_MD: unit rows.
        owner_M: the image each caption belongs to; every image owns at least one.

    Returns:
        {"metrics", "hits", "queries", "interval_95", "chance"}, each {name: value}.
    """
    text_ranks_M, image_ranks_N = ranks(images_ND, texts_MD, owner_M)
    captions_N = torch.bincount(owner_M, minlength=len(images_ND))
    result: dict[str, dict[str, Any]] = {
        name: {} for name in ("metrics", "hits", "queries", "interval_95", "chance")
    }
    for k in recall_k:
        for name, ranks_Q, positives_Q, items in (
            ("image_retrieval", text_ranks_M, torch.ones_like(owner_M), len(images_ND)),
            ("text_retrieval", image_ranks_N, captions_N, len(texts_MD)),
        ):
            name = f"{name}_recall@{k}"
            hits, queries = int((ranks_Q < k).sum()), len(ranks_Q)
            result["metrics"][name] = hits / queries
            result["hits"][name] = hits
            result["queries"][name] = queries
            result["interval_95"][name] = wilson(hits, queries)
            result["chance"][name] = chance(positives_Q, items, k)
    return result


def ranks(images_ND: Tensor, texts_MD: Tensor, owner_M: Tensor) -> tuple[Tensor, Tensor]:
    """How many items come before the first positive: of each text [M], of each image [N]."""
    device, texts, images = texts_MD.device, len(texts_MD), len(images_ND)
    own_M = torch.empty(texts, device=device)  # each caption's score with its own image
    for t in range(0, texts, TILE_TEXTS):
        rows = slice(t, t + TILE_TEXTS)
        own_M[rows] = (texts_MD[rows].double() * images_ND[owner_M[rows]].double()).sum(1).float()
    best_N = torch.full((images,), -math.inf, device=device)
    best_N = best_N.scatter_reduce(0, owner_M, own_M, "amax")
    # the earliest of an image's captions that have its best score
    number_M = torch.arange(texts, device=device)
    is_best_M = own_M == best_N[owner_M]
    first_N = torch.full((images,), texts, device=device)
    first_N = first_N.scatter_reduce(0, owner_M[is_best_M], number_M[is_best_M], "amin")

    text_ranks_M = torch.zeros(texts, dtype=torch.int64, device=device)
    image_ranks_N = torch.zeros(images, dtype=torch.int64, device=device)
    for t in range(0, texts, TILE_TEXTS):
        rows = slice(t, t + TILE_TEXTS)
        texts_tD, text_t1 = texts_MD[rows].double(), number_M[rows, None]
        own_t1, owner_t1 = own_M[rows, None], owner_M[rows, None]
        for n in range(0, images, TILE_IMAGES):
            columns = slice(n, n + TILE_IMAGES)
            scores_tn = (texts_tD @ images_ND[columns].double().T).float()
            image_n = torch.arange(n, n + scores_tn.shape[1], device=device)
            tied_tn = (scores_tn == own_t1) & (image_n < owner_t1)
            text_ranks_M[rows] += ((scores_tn > own_t1) | tied_tn).sum(1)
            tied_tn = (scores_tn == best_N[columns]) & (text_t1 < first_N[columns])
            image_ranks_N[columns] += ((scores_tn > best_N[columns]) | tied_tn).sum(0)
    return text_ranks_M, image_ranks_N


def wilson(hits: int, queries: int) -> list[float]:
    """Wilson's 95% interval of a proportion, [low, high]."""
    z, share = 1.959963984540054, hits / queries
    middle = (share + z * z / (2 * queries)) / (1 + z * z / queries)
    spread = math.sqrt(share * (1 - share) / queries + z * z / (4 * queries * queries))
    half = z * spread / (1 + z * z / queries)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def chance(positives_Q: Tensor, items: int, k: int) -> float:
    """Recall@k of a random order: k / items where a query has one positive.

    With c positives a query misses with the chance that k draws without return avoid them all.
    """
    positives: list[int] = positives_Q.cpu().numpy().tolist()
    k = min(k, items)
    missed = sum(
        queries * (math.comb(items - c, k) / math.comb(items, k))
        for c, queries in Counter(positives).items()
    )
    return 1 - missed / len(positives)


def _find(path: Path, split: str) -> tuple[Path, str | None]:
    """The directory that holds the tars, and the split's name if the set has splits."""
    if (path / split).is_dir():
        return path / split, split
    if any(path.glob("*.tar")):
        return path, None
    splits = sorted(p.parent.name for p in path.glob("*/nshards.txt"))
    found = f"its splits are {', '.join(splits)}" if splits else "no split or shard is there"
    raise RetrievalError(f"{path} has no split {split!r}: {found}; give --split or another set")


def embed_set(
    loaded: LoadedModel, directory: Path, *, batch_size: int = 128, workers: int = 2
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images [N, D], captions [M, D], each caption's image [M], and the images not read.

    Raises:
        RetrievalError: no pictures, a picture without a caption, too many that are broken.
    """
    rows, captions, failed = list[np.ndarray](), list[list[str]](), 0
    shards = list_shards(directory)
    for part in embed_images(loaded, shards, batch_size=batch_size, workers=workers):
        rows.append(part.embeddings_ND)
        failed += len(part.failures)
        for record in part.records:
            lines = (record.caption or "").splitlines()
            captions.append([line.strip() for line in lines if line.strip()])
            if not captions[-1]:
                raise RetrievalError(
                    f"{part.shard}: {record.key} has no caption (.txt); retrieval is defined for "
                    "captioned images only"
                )
    if not captions:
        raise RetrievalError(f"{directory} holds no images that can be read")
    check_failures(failed, failed + len(captions), directory)
    texts = [text for lines in captions for text in lines]
    owner_M = torch.repeat_interleave(torch.tensor([len(lines) for lines in captions]))
    texts_MD = embed_texts(loaded, texts)
    return (
        torch.as_tensor(np.concatenate(rows)),
        torch.as_tensor(texts_MD),
        owner_M,
        failed,
    )
