"""Recall@k against a dense float64 reference and CLIP_benchmark's definition."""

# N images, M captions, D width

import math
from typing import Any

import numpy as np
import pytest
import torch
from clip_retrieval import evaluate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KS = (1, 5, 10)


def random_set(
    seed: int, images: int = 60, levels: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows, one to five captions an image in mixed order; few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    counts_N = torch.randint(1, 6, (images,), generator=generator)
    owner_M = torch.repeat_interleave(torch.arange(images), counts_N)
    owner_M = owner_M[torch.randperm(len(owner_M), generator=generator)]
    images_ND = torch.randn(images, 8, generator=generator)
    texts_MD = images_ND[owner_M] + 2 * torch.randn(len(owner_M), 8, generator=generator)
    if levels is not None:  # few directions, all exact in float32
        images_ND = torch.eye(8)[torch.randint(0, levels, (images,), generator=generator)]
        texts_MD = torch.eye(8)[torch.randint(0, levels, (len(owner_M),), generator=generator)]
    return (
        torch.nn.functional.normalize(images_ND, dim=1),
        torch.nn.functional.normalize(texts_MD, dim=1),
        owner_M,
    )


def dense_hits(scores: Tensor, positive: Tensor, k: int) -> int:
    """Any positive among the k first of a stable sort: equal scores keep their order."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    return int(positive.gather(1, order).any(1).sum())


def positives(owner_M: Tensor, images: int) -> Tensor:
    return owner_M[:, None] == torch.arange(images)[None]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [None, 2, 1])
@pytest.mark.parametrize("tiles", [(1024, 4096), (7, 13)])
def test_equals_dense_float64(
    seed: int, levels: int | None, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TILE_TEXTS", tiles[0])
    monkeypatch.setattr(evaluate, "TILE_IMAGES", tiles[1])
    images_ND, texts_MD, owner_M = random_set(seed, levels=levels)
    result = evaluate.recall(images_ND, texts_MD, owner_M, KS)
    scores_MN = (texts_MD.double() @ images_ND.double().T).float()
    positive_MN = positives(owner_M, len(images_ND))
    for k in KS:
        assert result["hits"][f"image_retrieval_recall@{k}"] == dense_hits(
            scores_MN, positive_MN, k
        )
        assert result["hits"][f"text_retrieval_recall@{k}"] == dense_hits(
            scores_MN.T, positive_MN.T, k
        )


@pytest.mark.parametrize("seed", range(3))
def test_equals_clip_benchmark(seed: int) -> None:
    """To the last digit: it averages in float32, which is hits / queries, rounded."""
    images_ND, texts_MD, owner_M = random_set(seed)
    scores_MN = texts_MD @ images_ND.T
    positive_MN = positives(owner_M, len(images_ND))
    result = evaluate.recall(images_ND, texts_MD, owner_M, KS)
    for name, scores, positive in (
        ("image_retrieval", scores_MN, positive_MN),
        ("text_retrieval", scores_MN.T, positive_MN.T),
    ):
        for k in KS:
            # CLIP_benchmark 1.6.2, recall_at_k: positives among torch.topk's, above zero, averaged
            chosen = torch.nn.functional.one_hot(scores.topk(k, dim=1).indices, scores.shape[1])
            recall = (chosen * positive[:, None]).sum((1, 2)) / positive.sum(1)
            expected = (recall > 0).float().mean().item()
            assert float(np.float32(result["metrics"][f"{name}_recall@{k}"])) == expected


class Largest(TorchDispatchMode):
    """The most numbers that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


def test_nothing_grows_with_images_times_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TILE_TEXTS", 16)
    monkeypatch.setattr(evaluate, "TILE_IMAGES", 32)
    images_ND, texts_MD, owner_M = random_set(0, images=300)
    with Largest() as largest:
        evaluate.recall(images_ND, texts_MD, owner_M, KS)
    assert largest.numbers <= texts_MD.numel() < len(images_ND) * len(texts_MD) / 30


def test_collapsed_embeddings_score_chance() -> None:
    images_ND = torch.ones(50, 4) / 2
    result = evaluate.recall(images_ND, images_ND, torch.arange(50), (5,))
    assert result["metrics"] == pytest.approx(result["chance"])
    assert result["chance"]["image_retrieval_recall@5"] == pytest.approx(5 / 50)


def test_chance_with_several_captions_is_the_random_order() -> None:
    counts = torch.tensor([1, 1, 3])
    expected = 1 - sum(math.comb(5 - c, 2) / math.comb(5, 2) for c in (1, 1, 3)) / 3
    assert evaluate.chance(counts, 5, 2) == pytest.approx(expected)
    assert evaluate.chance(counts, 5, 5) == evaluate.chance(counts, 5, 9) == 1


def test_wilson() -> None:
    # Wilson's score interval as statsmodels gives it for 8 of 10
    assert evaluate.wilson(8, 10) == pytest.approx([0.4901625, 0.9433178], abs=1e-6)
    assert evaluate.wilson(0, 10) == pytest.approx([0, 0.2775328], abs=1e-6)
    assert evaluate.wilson(10, 10) == pytest.approx([0.7224672, 1], abs=1e-6)
