"""The feature cache: nothing decoded twice, nothing stale read, nothing lost to a kill."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import LoadedModel, load_model
from clip_probe import ProbeError
from clip_probe.datasets import Split, open_split
from clip_probe.extract import _Pixels
from clip_probe.features import encode
from safetensors.torch import load_file, save_file

Run = Callable[..., list[dict[str, Any]]]
Fail = Callable[..., str]
Digits = list[tuple[bytes, int]]
WriteSet = Callable[..., Path]
KillAt = Callable[[int, Callable[[], object]], bool]


@pytest.fixture(autouse=True)
def blocks_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("extract", "features"):
        monkeypatch.setattr(f"clip_probe.{module}.BLOCK", 64)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images decoded since."""
    numbers: list[int] = []
    read = _Pixels.__getitem__

    def counted(self: _Pixels, number: int) -> Any:
        numbers.append(number)
        return read(self, number)

    monkeypatch.setattr(_Pixels, "__getitem__", counted)
    return numbers


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(model_dir)


@pytest.fixture(scope="module")
def split(digits: Path) -> Split:
    return open_split(digits, "test")


def test_each_image_is_decoded_once_for_all_tasks(
    loaded: LoadedModel, split: Split, tmp_path: Path, decoded: list[int]
) -> None:
    plain = encode(loaded, split, ("post", "pre"), workers=0)
    decoded.clear()
    first = encode(loaded, split, ("post", "pre"), workers=0, cache=tmp_path)
    assert decoded == list(range(400))
    again = encode(loaded, split, ("pre", "post"), workers=0, cache=tmp_path)
    assert len(decoded) == 400
    for encoded in (first, again):
        for kind in ("post", "pre"):
            assert torch.equal(encoded.features[kind], plain.features[kind])
        assert torch.equal(encoded.labels, plain.labels)
        assert encoded.kept == plain.kept == list(range(400))


def test_a_kind_that_is_missing_is_added_and_pixels_are_not_kept(
    loaded: LoadedModel, split: Split, tmp_path: Path, decoded: list[int]
) -> None:
    encode(loaded, split, ("post",), workers=0, cache=tmp_path)
    both = encode(loaded, split, ("post", "pixels"), workers=0, cache=tmp_path)
    assert len(decoded) == 800
    assert both.features["pixels"].shape == (400, 3 * 32 * 32)
    assert not list(tmp_path.glob("*/pixels"))
    encode(loaded, split, ("pre",), workers=0, cache=tmp_path)
    assert len(decoded) == 1200
    assert len(list(tmp_path.glob("*/pre/*.safetensors"))) == 7  # of 64 images, the last of 16


def test_interrupted_extraction_continues_with_the_next_block(
    loaded: LoadedModel, split: Split, tmp_path: Path, decoded: list[int]
) -> None:
    """Any block may be missing; the batches of the others are the same."""
    whole = encode(loaded, split, workers=0, cache=tmp_path, batch_size=48)
    files = sorted(tmp_path.glob("*/post/*"))
    for number in (1, 6):
        files[number].unlink()
    decoded.clear()
    again = encode(loaded, split, workers=0, cache=tmp_path, batch_size=48)
    assert decoded == [*range(64, 128), *range(384, 400)]
    assert torch.equal(again.features["post"], whole.features["post"])


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_process_killed_in_extraction_keeps_what_it_has_done(
    after: int,
    loaded: LoadedModel,
    split: Split,
    tmp_path: Path,
    decoded: list[int],
    kill_at: KillAt,
) -> None:
    assert kill_at(after + 1, lambda: encode(loaded, split, workers=0, cache=tmp_path))
    there = len(list(tmp_path.glob("*/post/0*.safetensors")))
    assert there == after - 1  # about.json came first
    again = encode(loaded, split, workers=0, cache=tmp_path)
    assert decoded == list(range(64 * there, 400))
    plain = encode(loaded, split, workers=0)
    assert torch.equal(again.features["post"], plain.features["post"])


def test_nothing_stale_is_read(
    loaded: LoadedModel, model_dir: Path, digits: Path, tmp_path: Path, decoded: list[int]
) -> None:
    """Other weights, activation, transform, bytes or precision: another key."""
    cache, data = tmp_path / "cache", shutil.copytree(digits, tmp_path / "digits")
    first = encode(loaded, open_split(data, "val"), workers=0, cache=cache)

    other = shutil.copytree(model_dir, tmp_path / "other")
    weights = load_file(other / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1
    save_file(weights, other / "open_clip_model.safetensors")
    changed = encode(load_model(other), open_split(data, "val"), workers=0, cache=cache)
    assert not torch.equal(changed.features["post"], first.features["post"])

    (data / "classnames.txt").write_text("\n".join("abcdefghij") + "\n")  # not of the pixels
    encode(loaded, open_split(data, "val"), workers=0, cache=cache)
    assert len(decoded) == 200

    config = (model_dir / "open_clip_config.json").read_text()
    squashed = shutil.copytree(model_dir, tmp_path / "squashed")
    config = config.replace('"resize_mode": "shortest"', '"resize_mode": "squash"')
    (squashed / "open_clip_config.json").write_text(config)
    encode(load_model(squashed), open_split(data, "val"), workers=0, cache=cache)
    assert len(decoded) == 300

    config = (model_dir / "open_clip_config.json").read_text()
    quick = shutil.copytree(model_dir, tmp_path / "quick")  # the same weights
    config = config.replace('"embed_dim"', '"quick_gelu": true, "embed_dim"')
    (quick / "open_clip_config.json").write_text(config)
    changed = encode(load_model(quick), open_split(data, "val"), workers=0, cache=cache)
    assert not torch.equal(changed.features["post"], first.features["post"])
    assert len(decoded) == 400

    half = encode(loaded, open_split(data, "val"), workers=0, cache=cache, precision="bf16")
    assert len(decoded) == 500
    assert torch.allclose(half.features["post"], first.features["post"], atol=0.1)
    assert not torch.equal(half.features["post"], first.features["post"])

    shard = data / "val" / "0.tar"  # the same names and sizes, other pixels
    shard.write_bytes((data / "val" / "1.tar").read_bytes())
    encode(loaded, open_split(data, "val"), workers=0, cache=cache)
    assert len(decoded) == 600
    assert len(list(cache.iterdir())) == 6


def test_a_damaged_block_is_named(
    run: Run, fail: Fail, model_dir: Path, digits: Path, tmp_path: Path
) -> None:
    arguments = ("zeroshot", model_dir, digits, "--split", "val", "--cache", tmp_path)
    (row,) = run(*arguments)
    block = next(tmp_path.glob("*/post/00001.safetensors"))
    block.write_bytes(block.read_bytes()[:100])
    line = fail(*arguments)
    assert str(block) in line
    assert "remove it" in line
    block.unlink()
    assert run(*arguments) == [row]


def test_corrupt_images_are_remembered(
    run: Run, fail: Fail, model_dir: Path, rows: Digits, write_set: WriteSet, tmp_path: Path
) -> None:
    """A whole block of them too."""
    bad = [(b"not an image", label) for _, label in rows[:64]]
    path = write_set(tmp_path / "few", {"test": [*rows[:1400], *bad]}, shards=1)
    cache = tmp_path / "cache"
    expected = run("zeroshot", model_dir, path)
    assert run("zeroshot", model_dir, path, "--cache", cache) == expected
    assert run("zeroshot", model_dir, path, "--cache", cache) == expected
    assert expected[0]["failed"] == 64
    path = write_set(tmp_path / "many", {"test": [*rows[:100], *bad[:6]]}, shards=1)
    for _ in range(2):
        line = fail("zeroshot", model_dir, path, "--cache", cache)
        assert "6 images so far cannot be decoded, of 106" in line


def test_features_that_are_not_numbers_are_never_kept(
    fail: Fail, model_dir: Path, digits: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    weights = load_file(broken / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, broken / "open_clip_model.safetensors")
    cache = tmp_path / "cache"
    for _ in range(2):
        line = fail("zeroshot", broken, digits, "--cache", cache)
        assert "the 'post' features of image 's0000000' are not finite" in line
    assert not list(cache.glob("*/post/*"))


def test_several_processes_need_a_cache(
    loaded: LoadedModel, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProbeError, match="give it with --cache"):
        encode(loaded, split)
