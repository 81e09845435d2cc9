"""Queries: sums of terms, thresholds, filters, folded duplicates, embeddings, URLs of loopback."""

import io
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from clip_models import load_model
from clip_retrieval import Index, RetrievalError, build_index
from clip_retrieval.cli import main
from clip_retrieval.embed import embed_image, embed_texts
from clip_retrieval.metadata import COLUMNS, Metadata, MetadataWriter

from .conftest import picture, training_sample, write_tar


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def answers(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def index(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures, the first of them three times more."""
    path = tmp_path_factory.mktemp("query")
    samples = [training_sample(0, row) for row in range(30)]
    samples += [(f"again{n}", samples[0][1]) for n in range(3)]
    write_tar(path / "shards" / "00000.tar", samples)
    build_index(model, path / "shards", path / "index", workers=0)
    return path / "index"


def test_a_sum_of_terms(index: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    file.write_bytes(picture(5))
    (found,) = answers(
        run("query", index, "--image", file, "--text", "cat", "--minus-text", "dog", "-k", 33)
    )
    loaded = load_model(model)
    total = embed_image(loaded, picture(5))[0] + embed_texts(loaded, ["cat"])[0]
    total -= embed_texts(loaded, ["dog"])[0]
    exact = Index(index).rows.unit(np.arange(33)) @ (total / np.linalg.norm(total))
    assert [hit["similarity"] for hit in found["hits"]] == pytest.approx(-np.sort(-exact), abs=1e-5)
    terms = [{"text": "cat"}, {"image": str(file)}, {"text": "dog", "weight": -1.0}]
    assert found["query"] == {"combined": terms}
    both = run("query", index, "--text", "cat", "--text", "dog", "--combine", "--format", "table")
    assert both.stdout.startswith("“cat” + “dog”\n")
    result = run("query", index, "--text", "cat", "--minus-text", "cat")
    assert "the terms cancel each other" in result.stderr


def test_threshold_and_filter(index: Path) -> None:
    opened = Index(index)
    query = opened.vector(4)[None]
    exact = opened.rows.unit(np.arange(33)) @ query[0]
    cut = float(np.sort(exact)[-6])
    (found,) = opened.search(query, 33, threshold=cut - 1e-6)
    assert [m.row for m in found] == np.argsort(-exact, kind="stable")[:6].tolist()
    (found,) = opened.search(query, 33, where="seed >= 10 and seed < 20")
    assert sorted(m.row for m in found) == list(range(10, 20))
    assert [m.similarity for m in found] == pytest.approx(-np.sort(-exact[10:20]), abs=1e-5)
    assert [len(m) for m in opened.search(query, 5, where="key = nothing")] == [0]
    assert {m.row for m in opened.search(query, 33, where="key ~ AGAIN")[0]} == {30, 31, 32}
    for where, message in (("seed", "is not `NAME OP VALUE`"), ("sed > 3", "no row has 'sed'")):
        with pytest.raises(RetrievalError, match=message):
            opened.search(query, 5, where=where)


def test_values_of_a_filter(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "caption": "Salt and pepper", "json": '{"n": 9007199254740993, "ok": true}'},
        {"key": "b", "caption": "salt", "json": '{"n": 9007199254740992, "ok": false}'},
        {"key": "c", "caption": "it's pepper", "json": '{"n": 2.5}'},
    ]
    writer = MetadataWriter(tmp_path / "m")
    writer.write(pa.Table.from_pylist(rows, schema=COLUMNS))
    writer.close()
    metadata = Metadata(tmp_path / "m")
    for where, expected in {
        "caption ~ 'salt and pepper'": [0],
        'caption ~ "salt and" and ok = true': [0],
        "caption ~ salt and ok = FALSE": [1],
        "caption ~ it's and key != 'b'": [2],
        "ok = 1": [0],
        "n = 9007199254740993": [0],
        "n >= 9007199254740992": [0, 1],
        "n < 3e2": [2],
        "caption = ''": [],
    }.items():
        assert metadata.matching(where).tolist() == expected, where


def test_duplicates_are_folded(index: Path) -> None:
    opened = Index(index)
    plain, folded = (opened.search(opened.vector(0)[None], 3, fold=f)[0] for f in (None, 0.99999))
    assert [m.row for m in plain] == [0, 30, 31]
    assert (folded[0].row, folded[0].duplicates) == (0, (30, 31, 32))
    assert len(folded) == 3  # it looked further
    assert len({m.row for m in folded}) == 3
    (everything,) = opened.search(opened.vector(0)[None], 33, fold=0.99999)
    assert sum(1 + len(m.duplicates) for m in everything) == 33
    hit = opened.nearest(opened.vector(0)[None], 4, fold=0.99999)[0][0]
    assert hit.to_dict()["duplicates"] == (30, 31, 32)
    assert "duplicates" not in opened.nearest(opened.vector(0)[None], 1)[0][0].to_dict()


def test_embeddings_as_queries(index: Path, tmp_path: Path) -> None:
    rows = Index(index).rows.unit(np.array([3, 9]))
    np.save(tmp_path / "rows.npy", 2 * rows)
    found = answers(run("query", index, "--embedding", tmp_path / "rows.npy", "-k", 1))
    assert [a["hits"][0]["row"] for a in found] == [3, 9]
    assert found[1]["query"] == {"embedding": f"{tmp_path / 'rows.npy'}[1]"}
    assert found[0]["hits"][0]["similarity"] == 1
    lines = "\n".join(json.dumps(row.tolist()) for row in rows).encode()
    found = answers(run("query", index, "--embedding", "-", "-k", 1, stdin=lines))
    assert [a["hits"][0]["row"] for a in found] == [3, 9]
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}]), allow_pickle=True)
    for bad, message in (
        (b"words", "holds no embeddings"),
        (b"[1, 2]", "holds vectors of 32 numbers"),
        (b"[]", "holds no embeddings"),
        (json.dumps([0] * 32).encode(), "is zero or not finite"),
        (buffer.getvalue(), "holds no embeddings"),
    ):
        result = run("query", index, "--embedding", "-", stdin=bad)
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr
    assert run("query", index, "--embedding", "-", "--image", "-").exit_code == 2


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_behind_a_url(index: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "p é.png").write_bytes(picture(7))
    for name in ("p é.png", "p%20%C3%A9.png"):
        (found,) = answers(run("query", index, "--image", f"{address}/{name}", "-k", 1))
        assert found["hits"][0]["row"] == 7
    for url, message in (
        (f"{address}/none.png", "HTTP status 404"),
        ("http://[::1/x.png", "Invalid IPv6 URL"),
        ("http://192.0.2.1/p.png", "is not on this machine"),
        ("https://127.0.0.1/p.png", "is not on this machine"),
        ("http://127.0.0.1:1/p.png", "refused"),
    ):
        result = run("query", index, "--image", url)
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr


def test_verify_and_info(index: Path) -> None:
    (found,) = answers(run("verify", index))
    assert found == {"index": str(index), "images": 33, "faults": {}}
    told = json.loads(run("info", index).stdout)
    assert (told["images"], told["bytes_per_row"]["image.index"]) == (33, pytest.approx(136, abs=4))


def test_verify_finds_harmed_rows(index: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(index, tmp_path / "copy")
    file = copy / "g1" / "rows.index"
    data = bytearray(file.read_bytes())
    data[-64 * 3 : -64 * 2] = bytes(64)  # a row of zeros
    file.write_bytes(data)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "row 30 has the length 0.000" in json.loads(result.stdout)["faults"]["embeddings"]
