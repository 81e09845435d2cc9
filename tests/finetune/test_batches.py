from collections import Counter
from pathlib import Path

import pytest
import torch
from clip_finetune import FinetuneError, open_set
from clip_finetune.batches import EvalBatches, TrainBatches, loader, refuse_corrupt
from clip_models import Preprocess

from .conftest import SIZE, digits, write_set


def train_batches(*paths: Path, **options: int) -> TrainBatches:
    settings = {"batch_size": 20, "seed": 3} | options
    sets = [open_set(path, "train") for path in paths]
    return TrainBatches(sets, Preprocess(SIZE).train, **settings)


def test_tasks_alternate_and_each_epoch_is_exactly_once(digits_set: Path, inverted_set: Path):
    batches = train_batches(digits_set, inverted_set)
    assert [batches[step].source for step in range(5)] == [0, 1, 0, 1, 0]
    labels = torch.cat([batches[step].labels for step in range(0, 20, 2)])  # 10 x 20: one epoch
    assert Counter(labels.tolist()) == Counter(batches.tasks[0].label_N.tolist())
    second = torch.cat([batches[step].labels for step in range(20, 40, 2)])
    assert sorted(second.tolist()) == sorted(labels.tolist())
    assert not torch.equal(second, labels)


def test_a_batch_depends_on_seed_and_step_only(digits_set: Path):
    one, other = train_batches(digits_set), train_batches(digits_set)
    one[0], one[1]
    assert torch.equal(one[7].images, other[7].images)
    assert not torch.equal(train_batches(digits_set, seed=4)[7].images, other[7].images)


def test_processes_share_the_global_batch(digits_set: Path):
    whole = train_batches(digits_set)[11]
    parts = [train_batches(digits_set, rank=rank, world=4)[11] for rank in range(4)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    with pytest.raises(FinetuneError, match="20 does not divide among 3"):
        train_batches(digits_set, world=3)


def test_workers_change_nothing(digits_set: Path):
    batches = train_batches(digits_set)
    alone = list(loader(batches, range(2, 6), workers=0))
    helped = list(loader(batches, range(2, 6), workers=2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))


def test_few_shot_sets_repeat(tmp_path: Path):
    path = write_set(tmp_path / "few", {"train": digits(0, 3)}, shards=1)
    batch = train_batches(path)[0]
    assert batch.images.shape == (20, 3, SIZE, SIZE)
    assert len(batch.labels.unique()) == 3


def test_corrupt_images(tmp_path: Path):
    samples = [*digits(0, 10), (b"not an image", 5)]
    path = write_set(tmp_path / "s", {"train": samples}, shards=1)
    batches = train_batches(path, batch_size=11)
    batch = batches[0]
    assert batch.corrupt == 1
    assert len(batch.images) == 11
    assert Counter(batch.labels.tolist())[0] == 2  # the first sample stands in for the last

    evaluated = list(EvalBatches([open_set(path, "train")], Preprocess(SIZE), 4))
    assert [len(batch.labels) for batch in evaluated] == [4, 4, 2]
    assert sum(batch.corrupt for batch in evaluated) == 1
    with pytest.raises(FinetuneError, match="1 of 11 images cannot be decoded"):
        refuse_corrupt(batches.tasks[0], 1, drawn=0)
    refuse_corrupt(batches.tasks[0], 1, drawn=20)
