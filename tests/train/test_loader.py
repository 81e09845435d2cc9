"""Batches: the same for any number of processes and workers, and around unreadable samples."""

from pathlib import Path

import pytest
import torch
from clip_models import Preprocess, Tokenizer
from clip_train import TrainError
from clip_train.loader import MAX_REPLACED, Batches, choose_caption, load
from clip_train.order import Order
from clip_train.shards import open_data

from .conftest import pair, write_shard

CPU = torch.device("cpu")


def batches(data: Path, rank: int = 0, world: int = 1, batch_size: int = 12) -> Batches:
    found = open_data(str(data))
    order = Order(found.counts, 5, 2)
    transform, tokenizer = Preprocess(32), Tokenizer()
    return Batches(
        found.shards, order, transform, tokenizer, batch_size=batch_size, rank=rank, world=world
    )


def test_processes_share_the_global_batch(data: Path) -> None:
    for step in (0, 5, 11):  # 5 runs on into the second epoch
        whole = batches(data)[step]
        parts = [batches(data, rank, 3)[step] for rank in range(3)]
        assert torch.equal(whole.images_b3SS, torch.cat([p.images_b3SS for p in parts]))
        assert torch.equal(whole.tokens_bL, torch.cat([p.tokens_bL for p in parts]))


def test_workers_and_start_do_not_change_the_data(data: Path) -> None:
    alone = list(load(batches(data), range(2, 8), 0, CPU))
    helped = list(load(batches(data), range(4, 8), 2, CPU))
    for one, other in zip(alone[2:], helped, strict=True):
        assert torch.equal(one.images_b3SS, other.images_b3SS)
        assert torch.equal(one.tokens_bL, other.tokens_bL)
    assert alone[0].images_b3SS.dtype == torch.uint8
    assert alone[0].images_b3SS.shape == (12, 3, 32, 32)


def test_an_epoch_shows_every_caption_once(data: Path) -> None:
    rows = torch.cat([b.tokens_bL for b in load(batches(data, batch_size=10), range(7), 0, CPU)])
    expected = Tokenizer()([pair(i)["txt"].decode() for i in range(70)])
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_unreadable_samples_are_named_and_replaced(tmp_path: Path) -> None:
    samples = {f"k{i:02}": pair(i) for i in range(40)}
    samples["k03"]["jpg"] = samples["k03"]["jpg"][:100]
    del samples["k11"]["txt"]
    samples["k20"]["txt"] = b"\xff\xfe"
    samples["k21"]["txt"] = b" \n"
    write_shard(tmp_path / "0.tar", samples)
    found = [batches(tmp_path, batch_size=8)[step] for step in range(5)]
    named = sorted(line.split(":")[0] for b in found for line in b.unreadable)
    assert set(named) == {f"{tmp_path.name}/0.tar/k{i}" for i in ("03", "11", "20", "21")}
    assert all(b.failure is None and len(b.images_b3SS) == 8 for b in found)
    again = batches(tmp_path, batch_size=8)[2]
    assert torch.equal(again.images_b3SS, found[2].images_b3SS)
    # the replacement comes from another batch: none of this one appears twice
    assert all(len(b.tokens_bL.unique(dim=0)) == 8 for b in found)


def test_gives_up_when_nothing_can_be_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {f"k{i}": {"jpg": b"no", "txt": b"x"} for i in range(4)})
    failure = batches(tmp_path, batch_size=2)[0].failure
    assert failure is not None
    assert failure.startswith(f"{MAX_REPLACED} unreadable samples in a row")


@pytest.mark.parametrize("broken", ["missing", "truncated"])
def test_samples_of_a_broken_shard_are_replaced(tmp_path: Path, broken: str) -> None:
    for name in "01":
        write_shard(tmp_path / f"{name}.tar", {f"{name}{i}": pair(i) for i in range(4)})
    (tmp_path / "sizes.json").write_text('{"0.tar": 4, "1.tar": 4}')
    opened = batches(tmp_path, batch_size=2)
    if broken == "missing":
        (tmp_path / "1.tar").unlink()
    else:
        with (tmp_path / "1.tar").open("r+b") as file:
            file.truncate(5000)
    found = [opened[step] for step in range(4)]
    assert all(b.failure is None and len(b.images_b3SS) == 2 for b in found)
    named = {line.partition(": ")[0] for b in found for line in b.unreadable}
    assert named == {f"{tmp_path.name}/1.tar/row {i}" for i in range(4)}
    assert {name.rpartition("/")[2] for step in range(4) for name in opened.names(step)} == {
        *("00", "01", "02", "03", "row 0", "row 1", "row 2", "row 3")
    }


def test_wrong_sizes_json(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {f"k{i}": pair(i) for i in range(4)})
    (tmp_path / "sizes.json").write_text('{"0.tar": 5}')
    failure = batches(tmp_path, batch_size=2)[0].failure
    assert failure is not None
    assert "holds 4 samples, sizes.json says 5" in failure


def test_one_line_of_several_captions() -> None:
    text = b"one\n\n two \nthree"
    assert [choose_caption(text, seed) for seed in range(4)] == ["one", " two ", "three", "one"]
    with pytest.raises(TrainError, match="empty"):
        choose_caption(b"\n", 0)
