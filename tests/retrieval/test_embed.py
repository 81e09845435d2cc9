"""Embeddings in clip-retrieval's layout: what is written, resumed, shared out, and refused."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from clip_models import Preprocess, load_model
from clip_retrieval import Index, RetrievalError, build_index, embed_source
from clip_retrieval.cli import main
from clip_retrieval.embed import embed_texts
from clip_retrieval.embeddings import Embeddings
from PIL import Image

from .conftest import caption, picture, write_tar

# the picture lies on its side, and the camera's name is a fraction
BROKEN_EXIF = bytes.fromhex(
    "457869660000 49492a0008000000 0200 120103000100000006000000 0f0105000100000008000000 00000000"
)


@pytest.fixture(scope="module")
def embedded(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "out"
    result = embed_source(model, shards, path, workers=0, thumbnails=16)
    assert result is not None
    assert (result["status"], result["parts"], result["rows"]) == ("embedded", 3, 40)
    return path


@pytest.fixture
def copy(embedded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(embedded, tmp_path / "copy")


def test_the_layout_is_clip_retrievals(embedded: Path, model: Path) -> None:
    loaded = load_model(model)
    for part, rows in enumerate((20, 13, 7)):
        images, texts = (np.load(embedded / k / f"{k}_{part}.npy") for k in ("img_emb", "text_emb"))
        assert images.dtype == texts.dtype == np.float16
        assert images.shape == texts.shape == (rows, 32)
        table = pq.read_table(embedded / "metadata" / f"metadata_{part}.parquet")
        assert table["image_path"].to_pylist() == [f"{part:05d}{row:04d}" for row in range(rows)]
        captions = [caption(part * 1000 + row) for row in range(rows)]
        assert table["caption"].to_pylist() == captions
        np.testing.assert_allclose(texts, embed_texts(loaded, captions), atol=1e-3)


def test_embeddings_make_the_same_index(
    embedded: Path, model: Path, shards: Path, tmp_path: Path
) -> None:
    build_index(None, embedded, tmp_path / "a")
    build_index(model, shards, tmp_path / "b", workers=0)
    a, b = Index(tmp_path / "a"), Index(tmp_path / "b")
    np.testing.assert_array_equal(a.rows.stored_ND, b.rows.stored_ND)
    assert a.facts["inputs"] == b.facts["inputs"]
    assert a.image(25) == b.image(25) == picture(1005)
    assert Image.open(io.BytesIO(a.thumbnail(25) or b"")).size == (16, 16)
    assert b.thumbnail(25) is None


def test_folders_and_captions(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for n, name in enumerate(("b.png", "a.PNG", "sub/c.png")):
        (folder / name).write_bytes(picture(n))
    (folder / "b.txt").write_text("a cat\nanother")
    (folder / "b.json").write_text('{"url": "http://x/b.png", "n": 2}')
    (folder / "notes.md").write_text("none")
    build_index(model, folder, tmp_path / "index", workers=0)
    index = Index(tmp_path / "index")
    assert [index.row(row)["key"] for row in range(3)] == ["a.PNG", "b.png", "sub/c.png"]
    assert [index.image(row) for row in range(3)] == [picture(1), picture(0), picture(2)]
    assert index.row(1)["url"] == "http://x/b.png"
    lines = tmp_path / "captions.txt"
    lines.write_text("a red cat\n\na blue dog\n")
    embed_source(model, lines, tmp_path / "texts")
    build_index(None, tmp_path / "texts", tmp_path / "text-index")
    texts = Index(tmp_path / "text-index")
    query = embed_texts(load_model(model), ["a blue dog"])
    assert texts.nearest(query, 1)[0][0].caption == "a blue dog"


def test_odd_samples(model: Path, tmp_path: Path) -> None:
    """One is left out, the others are whole, thumbnails and all; a torn sidecar is no index."""
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).save(file, "JPEG", exif=BROKEN_EXIF)
    samples = [(f"{n:02d}", {"png": picture(n)}) for n in range(19)]
    samples += [("19", {"jpg": file.getvalue(), "json": b'{"url": "http://x/\\ud800.png"}'})]
    samples += [("caf\udce9", {"png": picture(2)})]
    tar = write_tar(tmp_path / "shards" / "00000.tar", samples)
    tar.with_suffix(".index.json").write_text('{"format": 1, "ke')
    build_index(model, tmp_path / "shards", tmp_path / "index", workers=0, thumbnails=16)
    index = Index(tmp_path / "index")
    assert (len(index), index.facts["failed"]) == (20, 1)
    assert index.row(19)["url"] == "http://x/?.png"
    assert Image.open(io.BytesIO(index.thumbnail(19) or b"")).size == (16, 16)
    result = CliRunner().invoke(main, ["query", str(tmp_path / "index"), "--text", "cat", "-k20"])
    assert result.exit_code == 0, result.output
    hits = json.loads(result.stdout)["hits"]
    (odd,) = (hit["json"] for hit in hits if hit["row"] == 19)
    assert odd == {"url": "http://x/\ud800.png"}


def test_as_clip_retrieval_makes_them(model: Path, tmp_path: Path) -> None:
    """Without our embeddings.json, float32, with columns of its own; loaded unchanged."""
    rows = np.random.default_rng(0).normal(size=(30, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for name in ("img_emb", "metadata"):
        (tmp_path / "emb" / name).mkdir(parents=True)
    for part, some in enumerate(np.split(rows, 3)):
        np.save(tmp_path / f"emb/img_emb/img_emb_{part}.npy", some)
        paths = [f"/p/{part}-{n}.jpg" for n in range(10)]
        table = pa.table({"image_path": paths, "url": paths, "width": range(10)})
        pq.write_table(table, tmp_path / f"emb/metadata/metadata_{part}.parquet")
    build_index(model, tmp_path / "emb", tmp_path / "index")
    index = Index(tmp_path / "index")
    assert index.facts["inputs"]["fingerprint"] == load_model(model).fingerprint
    assert [m[0].row for m in index.search(rows, 1)] == list(range(30))
    hit = index.nearest(rows[25:26], 1, where="width = 5")[0][0]
    assert (hit.key, hit.url, hit.json["width"]) == ("/p/2-5.jpg", "/p/2-5.jpg", 5)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("nan", r"img_emb_1.npy: row 3 has the length nan, expected 1"),
        ("long", r"img_emb_1.npy: row 3 has the length 2\.\d+, expected 1"),
        ("missing", r"img_emb: part 1 is missing, expected parts 0 to 2"),
        ("truncated", r"img_emb_1.npy cannot be read"),
        ("fewer", r"metadata_1.parquet: 13 rows beside 12 embeddings"),
        ("narrow", r"img_emb_1.npy: width 16, expected 32"),
        ("pickled", r"img_emb_1.npy cannot be read .*Python objects"),
        ("metadata", r"metadata_1.parquet cannot be read"),
    ],
)
def test_bad_embeddings(copy: Path, tmp_path: Path, harm: str, message: str) -> None:
    file = copy / "img_emb/img_emb_1.npy"
    rows = np.load(file)
    if harm in ("nan", "long"):
        rows[3] *= np.float16(np.nan if harm == "nan" else 2)
        np.save(file, rows)
    elif harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "metadata":
        (copy / "metadata/metadata_1.parquet").write_bytes(b"PAR1 no")
    else:
        changed = {"fewer": rows[1:], "narrow": rows[:, :16], "pickled": np.array([{}])}
        np.save(file, changed[harm], allow_pickle=True)
    with pytest.raises(RetrievalError, match=message):
        build_index(None, copy, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_another_model_or_source(
    copy: Path, other_model: Path, model: Path, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(RetrievalError, match="another fingerprint"):
        embed_source(other_model, shards, copy, thumbnails=16)
    with pytest.raises(RetrievalError, match="was not made with"):
        build_index(other_model, copy, tmp_path / "index")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(RetrievalError, match="is not empty"):
        embed_source(model, shards, tmp_path / "full")
    (tmp_path / "words").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RetrievalError, match="is not UTF-8"):
        embed_source(model, tmp_path / "words", tmp_path / "out")


@pytest.mark.slow
def test_two_processes(embedded: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", port, "-m", "clip_retrieval", "embed", model, shards, out]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(part) for part in [*command, "--workers", 0, "--thumbnails", 16]],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('"rows": 40') == 1
    assert Embeddings(out).count == 40
    for file in embedded.rglob("*.npy"):
        same = np.load(out / file.relative_to(embedded)).astype(np.float32)
        np.testing.assert_allclose(same, np.load(file).astype(np.float32), atol=1e-3)


def test_a_dead_worker_is_one_line(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Preprocess, "eval", killed)
    arguments = ["embed", str(model), str(shards), str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "Error: a process that decodes images was lost" in result.stderr
