"""Recall@k against a dense float64 reference and CLIP_benchmark's definition."""

# N images, M captions, D width

import math

import pytest
import torch
from clip_retrieval import evaluate
from torch import Tensor

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
    monkeypatch.setattr(evaluate, "TILE_QUERIES", tiles[0])
    monkeypatch.setattr(evaluate, "TILE_ITEMS", tiles[1])
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
    """CLIP_benchmark: top k by torch.topk, recall of the positives, above zero, averaged."""
    images_ND, texts_MD, owner_M = random_set(seed)
    scores_MN = texts_MD @ images_ND.T
    positive_MN = positives(owner_M, len(images_ND))
    result = evaluate.recall(images_ND, texts_MD, owner_M, KS)
    for name, scores, positive in (
        ("image_retrieval", scores_MN, positive_MN),
        ("text_retrieval", scores_MN.T, positive_MN.T),
    ):
        for k in KS:
            found = torch.zeros_like(positive).scatter(1, scores.topk(k, dim=1).indices, True)
            recall = (found & positive).sum(1) / positive.sum(1)
            expected = (recall > 0).double().mean().item()
            assert result["metrics"][f"{name}_recall@{k}"] == expected


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
