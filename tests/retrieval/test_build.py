"""Building: what is written, that it is whole, and that an interrupted build continues."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_models import load_model
from clip_retrieval import Index, RetrievalError, build, build_index, embed_parts, verify_index
from clip_retrieval.shards import read_samples

from .conftest import (
    caption,
    killed_twenty_times,
    make_shards,
    picture,
    training_sample,
    write_tar,
    write_vectors,
)


class Killed(BaseException):
    """Like SIGKILL, nothing may catch it."""


def contents(index: Path) -> dict[str, bytes]:
    """Of every file but the lock, by its name."""
    files = (path for path in sorted(index.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def stored(index: Path) -> np.ndarray:
    """The float16 rows, as float32."""
    return Index(index).rows.stored_ND.astype(np.float32)


@pytest.fixture(scope="module")
def index(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "index"
    result = build_index(model, shards, path, workers=0)
    assert result["status"] == "built"
    assert not path.with_name("index.partial").exists()
    return path


def test_rows_are_the_pictures_in_order(index: Path, model: Path) -> None:
    opened = Index(index)
    loaded = load_model(model)
    assert len(opened) == 40
    names = {"rows.index", "image.index", "metadata.arrow", "held_out.npz"}
    assert set(contents(index)) == names | {"index.json"}
    assert set(opened.facts["bytes"]) == names
    assert (opened.rows.stored_ND.dtype, opened.rows.stored_ND.shape) == (np.float16, (40, 32))
    for row, (shard, place) in {0: (0, 0), 19: (0, 19), 20: (1, 0), 39: (2, 6)}.items():
        seed = shard * 1000 + place
        assert opened.image(row) == picture(seed)
        pixels = loaded.preprocess.normalize(loaded.preprocess.eval(picture(seed))[None])
        expected = loaded.model.encode_image(pixels, normalize=True)[0].detach().numpy()
        np.testing.assert_allclose(stored(index)[row], expected, atol=1e-3)
        hit = opened.nearest(expected[None], 1)[0][0]
        assert (hit.row, hit.key) == (row, f"{shard:05d}{place:04d}")
        assert (hit.caption, hit.json) == (caption(seed), {"seed": seed})
        assert hit.similarity == pytest.approx(1, abs=1e-3)


def test_facts(index: Path, model: Path) -> None:
    facts = json.loads((index / "index.json").read_text())
    assert facts["images"] == 40
    assert facts["dim"] == 32
    assert facts["inputs"]["fingerprint"] == load_model(model).fingerprint
    assert facts["plan"]["family"] == "flat"
    assert facts["recall@10"] == {"image": 1.0, "text": 1.0}
    assert facts["held_out"] == {"image": 4, "text": 4}
    assert facts["bytes"]["rows.index"] == (index / "g1" / "rows.index").stat().st_size


def test_again_there_is_nothing_to_do(index: Path, model: Path, shards: Path) -> None:
    before = contents(index)
    assert build_index(model, shards, index)["status"] == "nothing left to do"
    assert contents(index) == before


@pytest.mark.parametrize("batch_size", [1, 7])
def test_workers_and_sidecars_change_nothing(
    index: Path, model: Path, shards: Path, tmp_path: Path, batch_size: int
) -> None:
    """Two workers, other batches, and clip-data's sidecar indexes in place of a scan."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    for tar in copy.glob("*.tar"):
        samples = list(read_samples(tar))
        extensions = list(samples[0].members)
        sidecar = {
            "format": 1,
            "tar_bytes": tar.stat().st_size,
            "keys": [s.key for s in samples],
            "members": {e: [s.members[e] for s in samples] for e in extensions},
        }
        tar.with_suffix(".index.json").write_text(json.dumps(sidecar))
    build_index(model, copy, tmp_path / "index", workers=2, batch_size=batch_size)
    new, old = contents(tmp_path / "index"), contents(index)
    assert new["metadata.arrow"] == old["metadata.arrow"]
    np.testing.assert_allclose(stored(tmp_path / "index"), stored(index), atol=1e-3)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (build.os, "replace", 1),  # embeddings.json
        (embed_parts, "write_part", 1),
        (embed_parts, "write_part", 3),
        (build, "write_rows", 1),
        (build, "tune", 1),
        (build.faiss_index, "write_index", 1),
        (build, "write_facts", 1),
        (build.os, "rename", 1),
        (build.shutil, "rmtree", 3),
    ],
)
def test_a_killed_build_continues(
    index: Path, model: Path, shards: Path, tmp_path: Path, owner: Any, name: str, call: int
) -> None:
    original, calls = getattr(owner, name), 0

    def killing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*arguments, **options)

    new = tmp_path / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killing)
        with pytest.raises(Killed):
            build_index(model, shards, new, workers=0)
    done = list((tmp_path / "index.partial").glob("embeddings/metadata/*.parquet"))
    assert new.exists() == (name == "rmtree")
    embedded: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embed_parts,
            "write_part",
            lambda out, n, *rest, write=embed_parts.write_part: (
                embedded.append(n),
                write(out, n, *rest),
            ),
        )
        build_index(model, shards, new, workers=0)
    if name != "rmtree":
        assert len(embedded) == 3 - len(done)  # what was done is not done again
    assert contents(new) == contents(index)
    assert not (tmp_path / "index.partial").exists()


def test_killed_at_random_moments(index: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    """SIGKILL twenty times, each build taking up what the last left; a finished one is whole."""
    new = tmp_path / "index"

    def assert_whole() -> None:
        assert contents(new)["metadata.arrow"] == contents(index)["metadata.arrow"]
        np.testing.assert_allclose(stored(new), stored(index), atol=1e-3)

    for _ in killed_twenty_times(lambda: build_index(model, shards, new, workers=0, batch_size=1)):
        if new.exists():
            assert_whole()
            shutil.rmtree(new)
    build_index(model, shards, new, workers=0, batch_size=1)
    assert_whole()
    assert not (tmp_path / "index.partial").exists()


def test_other_inputs_are_refused(
    index: Path, model: Path, other_model: Path, shards: Path, tmp_path: Path
) -> None:
    before = contents(index)
    with pytest.raises(RetrievalError, match="another fingerprint"):
        build_index(other_model, shards, index)
    with pytest.raises(RetrievalError, match="another source"):
        build_index(model, make_shards(tmp_path / "fewer", (20,)), index)
    with pytest.raises(RetrievalError, match="another target recall"):
        build_index(model, shards, index, target_recall=0.9)
    assert contents(index) == before
    (tmp_path / "something").mkdir()
    with pytest.raises(RetrievalError, match="exists and is no index"):
        build_index(model, shards, tmp_path / "something")


def test_a_begun_build_keeps_its_model(
    model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path / "shards", (5,))

    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_rows", stop)
        with pytest.raises(Killed):
            build_index(model, shards, tmp_path / "index", workers=0)
    with pytest.raises(RetrievalError, match=r"embeddings was made with another fingerprint"):
        build_index(other_model, shards, tmp_path / "index", workers=0)


def broken_shard(path: Path, good: int, bad: int) -> Path:
    samples = [training_sample(0, row) for row in range(good)]
    samples += [(f"bad{n:06d}", {"jpg": b"\xff\xd8 no", "txt": b"x"}) for n in range(bad)]
    write_tar(path / "00000.tar", samples)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_counted(
    model: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    shards = broken_shard(tmp_path / "shards", good=30, bad=1)
    result = build_index(model, shards, tmp_path / "index", workers=workers)
    assert (result["images"], result["failed"]) == (30, 1)
    assert "00000.tar: 1 of 31 images could not be read; first: bad000000" in caplog.text


def test_many_corrupt_images_stop_the_build(model: Path, tmp_path: Path) -> None:
    shards = broken_shard(tmp_path / "shards", good=30, bad=2)
    with pytest.raises(RetrievalError, match="2 of 32 images could not be read, more than 5%"):
        build_index(model, shards, tmp_path / "index", workers=0)
    assert not (tmp_path / "index").exists()
    # repaired, the same command completes
    broken_shard(shards, good=32, bad=0)
    assert build_index(model, shards, tmp_path / "index", workers=0)["images"] == 32


def test_no_images(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="nowhere is not there"):
        build_index(model, tmp_path / "nowhere", tmp_path / "index")
    (tmp_path / "shards").mkdir()
    with pytest.raises(RetrievalError, match=r"holds no .tar shard and no picture"):
        build_index(model, tmp_path / "shards", tmp_path / "index")
    write_tar(tmp_path / "shards" / "00000.tar", [("000000000", {"txt": b"words"})])
    with pytest.raises(RetrievalError, match="holds no images"):
        build_index(model, tmp_path / "shards", tmp_path / "index")
    (tmp_path / "shards" / "nshards.txt").write_text("2\n")
    with pytest.raises(RetrievalError, match=r"0.tar is missing"):
        build_index(model, tmp_path / "shards", tmp_path / "index")
    assert not list(tmp_path.glob("index*"))


def test_a_truncated_shard(model: Path, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    tar = copy / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(RetrievalError, match=r"00001.tar is not a whole uncompressed tar"):
        build_index(model, copy, tmp_path / "index")


def test_without_captions_only_images_are_asked(model: Path, tmp_path: Path) -> None:
    samples = [(f"s{n:07d}", {"png": picture(n), "cls": b"3"}) for n in range(20)]
    write_tar(tmp_path / "set" / "0.tar", samples)
    (tmp_path / "set" / "nshards.txt").write_text("1\n")
    result = build_index(model, tmp_path / "set", tmp_path / "index", workers=0)
    assert result["held_out"] == {"image": 2}
    hit = Index(tmp_path / "index").nearest(np.eye(32, dtype=np.float32)[:1], 1)[0][0]
    assert (hit.caption, hit.json) == (None, None)


def test_one_image(model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", (1,))
    result = build_index(model, shards, tmp_path / "index", workers=0)
    assert (result["images"], result["recall@10"]) == (1, {})


@pytest.mark.parametrize("family", ["hnsw", "ivf-sq8", "ivf-pq", "rabitq", "on-disk"])
def test_few_rows_in_a_large_family(tmp_path: Path, family: str) -> None:
    for count in (1, 12, 33):
        vectors, path = write_vectors(tmp_path / f"v{count}", count), tmp_path / str(count)
        if family == "ivf-pq" and count < 32:
            with pytest.raises(
                RetrievalError, match=rf"learns .* 32 rows or more, there are {count}"
            ):
                build_index(None, vectors, path, family=family)
            continue
        build_index(None, vectors, path, family=family)
        opened = Index(path)
        found = opened.search(opened.rows.unit(np.arange(count)), 1)
        assert np.mean([matches[0].row == row for row, matches in enumerate(found)]) > 0.9


@pytest.mark.parametrize("family", ["hnsw", "ivf-sq8", "ivf-pq", "rabitq", "on-disk"])
def test_larger_families_end_to_end(
    model: Path, large_embeddings: Path, tmp_path: Path, family: str
) -> None:
    result = build_index(None, large_embeddings, tmp_path / "index", family=family)
    assert result["plan"]["family"] == family
    assert result["held_out"] == {"image": 70, "text": 70}
    assert min(result["recall@10"].values()) >= 0.9
    opened = Index(tmp_path / "index")
    assert ("lists.ivfdata" in opened.facts["bytes"]) == (family == "on-disk")
    own = opened.search(opened.rows.unit(np.arange(700)), 1)
    assert np.mean([m[0].row == row for row, m in enumerate(own)]) > 0.97
    assert all(m[0].similarity == 1 for row, m in enumerate(own) if m[0].row == row)
    assert verify_index(tmp_path / "index")["faults"] == {}
