"""The service: clip-retrieval's answers, many clients at once, requests that make no sense."""

import base64
import contextlib
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from clip_retrieval import (
    Index,
    Query,
    RetrievalError,
    build_index,
    query_index,
    serve_app,
    serve_index,
    serve_requests,
)
from clip_retrieval import serve as serving
from clip_retrieval.change import append, remove
from clip_retrieval.cli import main
from clip_retrieval.serve import Server, make_server
from clip_retrieval.serve_index import Opened, ServedIndex
from PIL import Image

from .conftest import caption, make_shards, picture, write_tar

# What clip-retrieval's ClipClient sends besides its question.
CLIENT = {
    "text": None,
    "image": None,
    "image_url": None,
    "embedding_input": None,
    "deduplicate": True,
    "use_safety_model": True,
    "use_violence_detector": True,
    "indice_name": "tiny",
    "use_mclip": False,
    "aesthetic_score": 9,
    "aesthetic_weight": 0.5,
    "modality": "image",
    "num_images": 10,
    "num_result_ids": 10,
}


@pytest.fixture(scope="module")
def index(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    build_index(model, shards, path, workers=0)
    return path


@contextmanager
def running(indexes: dict[str, Path], **options: Any) -> Iterator[Server]:
    """A server of this process, in a thread."""
    server = make_server(indexes, port=0, device="cpu", **options)
    thread = threading.Thread(target=server.run, args=([server.listening],))
    thread.start()
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        server.listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(index: Path) -> Iterator[Server]:
    with running({"tiny": index, "again": index}, fold=0.9999, max_body=100_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=30) as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """As ClipClient does: JSON without a Content-Type."""
    answer = client.post("/knn-service", content=json.dumps(CLIENT | fields).encode())
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: httpx.Response, status: int) -> str:
    """The one line of an error."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert "\n" not in answer.json()["error"]
    return answer.json()["error"]


def image_field(data: bytes) -> str:
    return base64.b64encode(data).decode()


# What is answered ---------------------------------------------------------------------------------


def test_text_as_the_command_finds_it(client: httpx.Client, index: Path) -> None:
    (expected,) = query_index(Index(index), [Query(text="red cat")], k=10)
    found = ask(client, text="red cat", deduplicate=False)
    assert [hit["id"] for hit in found] == [hit.row for hit in expected.hits]
    similarities = [hit["similarity"] for hit in found]
    assert similarities == pytest.approx([hit.similarity for hit in expected.hits], abs=1e-5)
    assert [hit["caption"] for hit in found] == [hit.caption for hit in expected.hits]
    assert [hit["image_path"] for hit in found] == [hit.key for hit in expected.hits]
    assert [hit["seed"] for hit in found] == [hit.json["seed"] for hit in expected.hits]


def test_picture_vector_and_row_find_themselves(client: httpx.Client, index: Path) -> None:
    vector = Index(index).vector(23)
    for fields in (
        {"image": image_field(picture(1003))},
        {"embedding_input": (3 * vector).tolist()},  # is normalised
        {"id": 23},
    ):
        first = ask(client, **fields)[0]
        assert (first["id"], first["caption"]) == (23, caption(1003))
        assert first["similarity"] == pytest.approx(1, abs=1e-3)


def test_ids_and_metadata_apart(client: httpx.Client) -> None:
    """clip-retrieval's way to scroll: many ids at once, their metadata a page at a time."""
    found = ask(client, text="a dog", num_images=3, num_result_ids=30, deduplicate=False)
    assert len(found) == 30
    assert ["caption" in hit for hit in found] == [True] * 3 + [False] * 27
    ids = [hit["id"] for hit in found[3:6]]
    described = client.post("/metadata", json={"indice_name": "tiny", "ids": ids}).json()
    assert [entry["id"] for entry in described] == ids
    full = ask(client, text="a dog", num_images=6, deduplicate=False)
    for entry, hit in zip(described, full[3:6], strict=True):
        assert entry["metadata"].items() <= hit.items()
    assert client.post("/metadata", json={"ids": []}).json() == []


def test_more_than_there_is(client: httpx.Client) -> None:
    assert len(ask(client, text="cat", num_images=500, num_result_ids=500)) == 40


def test_duplicates_are_folded(model: Path, tmp_path: Path) -> None:
    """Every picture is there twice."""
    shards = make_shards(tmp_path / "shards", (8,))
    (tmp_path / "shards/00001.tar").write_bytes((shards / "00000.tar").read_bytes())
    build_index(model, shards, tmp_path / "index", workers=0)
    with running({"twice": tmp_path / "index"}, fold=0.9999) as server:
        client = httpx.Client(base_url=server.address, timeout=30)
        fields = {"indice_name": "twice", "text": "cat", "num_result_ids": 8}
        folded = ask(client, **fields)
        assert len(folded) == 8  # refilled
        assert {hit["id"] % 8 for hit in folded} == set(range(8))
        assert all(hit["duplicates"] == [hit["id"] + 8] for hit in folded)
        assert len({hit["id"] % 8 for hit in ask(client, **fields, deduplicate=False)}) == 4


def test_columns_of_the_data_and_nan(model: Path, tmp_path: Path) -> None:
    """LAION's metadata has a similarity of its own; the hit's is what is asked for."""
    columns = b'{"similarity": 7, "id": "x", "url": "http://a/b.jpg", "NSFW": "UNLIKELY", "p": NaN}'
    samples = [(f"{n:09d}", {"png": picture(n), "json": columns}) for n in range(3)]
    write_tar(tmp_path / "shards/00000.tar", samples)
    build_index(model, tmp_path / "shards", tmp_path / "index", workers=0)
    with running({"columns": tmp_path / "index"}) as server:
        client = httpx.Client(base_url=server.address, timeout=30)
        hit = ask(client, indice_name="columns", image=image_field(picture(1)), deduplicate=False)[
            0
        ]
        assert hit == {
            "id": 1,
            "similarity": pytest.approx(1, abs=1e-3),
            "caption": None,
            "image_path": "000000001",
            "url": "http://a/b.jpg",
            "NSFW": "UNLIKELY",
            "p": None,
        }


def test_the_first_index_is_asked_by_default(client: httpx.Client) -> None:
    assert client.get("/indices-list").json() == ["tiny", "again"]
    minimal = client.post("/knn-service", json={"text": "cat", "num_images": 2})
    assert minimal.json() == ask(client, text="cat", num_images=2, num_result_ids=2)
    assert ask(client, text="cat") == ask(client, text="cat", indice_name="again")


def test_what_is_ignored_is_said(client: httpx.Client) -> None:
    answer = client.post("/knn-service", json=CLIENT | {"text": "cat"})
    ignored = "use_safety_model, use_violence_detector, aesthetic_score, aesthetic_weight"
    assert answer.headers["ignored"] == ignored
    assert "ignored" not in client.post("/knn-service", json={"text": "cat"}).headers


def test_pictures(client: httpx.Client, index: Path) -> None:
    version = client.get("/indices").json()[0]["version"]
    plain = client.get("/image/tiny/23")
    assert plain.content == picture(1003) == client.get("/thumbnail/tiny/23").content  # it is small
    assert plain.headers["content-type"] == "image/png"
    assert plain.headers["cache-control"] == "no-cache"
    named = client.get(f"/image/tiny/23?v={version}")
    assert "immutable" in named.headers["cache-control"]
    again = client.get("/image/tiny/23", headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "40 pictures" in refusal(client.get("/image/tiny/40"), 404)
    assert "no index" in refusal(client.get("/image/none/0"), 400)


def test_small_pictures(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model sees them: upright, though the camera's name in the EXIF is a fraction."""
    turned, glass = io.BytesIO(), io.BytesIO()
    exif = "457869660000 49492a0008000000 0200 120103000100000006000000 0f0105000100000008000000"
    Image.new("RGB", (500, 250)).save(turned, "JPEG", exif=bytes.fromhex(exif + "00000000"))
    Image.new("RGBA", (500, 250), (255, 0, 0, 0)).save(glass, "PNG")
    for data, size, mode in (
        (turned.getvalue(), (200, 400), "RGB"),
        (glass.getvalue(), (400, 200), "RGBA"),
    ):
        monkeypatch.setattr(Index, "image", lambda *_, data=data: data)
        answer = client.get("/thumbnail/tiny/1")
        small = Image.open(io.BytesIO(answer.content))
        assert (answer.status_code, small.size, small.mode) == (200, size, mode)
    for data in (png(14_000, 14_000), b"GIF89a"):
        monkeypatch.setattr(Index, "image", lambda *_, data=data: data)
        refusal(client.get("/thumbnail/tiny/1"), 404)


def test_metrics(client: httpx.Client) -> None:
    ask(client, text="cat")
    ask(client, image=image_field(picture(3)))
    text = client.get("/metrics").text
    for name in (
        "full_knn_request_time_count",
        "text_clip_inference_time_sum",
        "image_clip_inference_time_sum",
        "image_prepro_time_sum",
        "knn_index_time_sum",
        "metadata_get_time_sum",
        "process_resident_memory_bytes",
        'http_requests_total{path="/knn-service",status="200"}',
    ):
        assert f"\n{name}" in text
    summary = client.get("/metrics-summary").text
    assert summary.startswith("Among ")
    assert "knn_index_time" in summary


# Many at once -------------------------------------------------------------------------------------


def test_64_clients_get_their_own_answers(server: Server, client: httpx.Client) -> None:
    """320 requests of every kind, mixed: each as it is answered alone, and many were batched."""
    kinds: list[dict[str, Any]] = [{"text": f"a {word} stone"} for word in ("red", "blue", "cat")]
    kinds += [{"image": image_field(picture(seed))} for seed in (5, 1003)]
    kinds += [{"id": 7, "num_images": 3}, {"text": "tree", "num_result_ids": 40}]
    alone = [ask(client, **fields) for fields in kinds]
    before = sums(client)

    def one_client(number: int) -> None:
        with httpx.Client(base_url=server.address, timeout=60) as own:
            for turn in range(5):
                kind = (number + turn) % len(kinds)
                for hit, expected in zip(ask(own, **kinds[kind]), alone[kind], strict=True):
                    assert hit["similarity"] == pytest.approx(expected["similarity"], abs=1e-5)
                    assert hit["id"] == expected["id"]

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(one_client, range(64)))
    after = sums(client)
    questions, batches = (after[name] - before[name] for name in ("sum", "count"))
    assert questions == 320
    assert batches < 320


def sums(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    prefix = "knn_batch_questions_"
    return {
        name: float(line.split()[1])
        for line in lines
        for name in ("sum", "count")
        if line.startswith(f"{prefix}{name} ")
    }


def test_a_full_queue_refuses(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "WAITING", 2)
    monkeypatch.setattr(serve_app, "BATCH", 1)
    go, begun = threading.Event(), threading.Event()
    answer = serve_app.ServedIndex.answer

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return answer(*arguments)

    monkeypatch.setattr(serve_app.ServedIndex, "answer", slow)
    with running({"tiny": index}) as server, ThreadPoolExecutor(8) as pool:
        url, body = f"{server.address}/knn-service", {"text": "cat"}
        first = pool.submit(httpx.post, url, json=body, timeout=30)
        assert begun.wait(30)
        others = [pool.submit(httpx.post, url, json=body, timeout=30) for _ in range(5)]
        while sum(other.done() for other in others) < 3:
            time.sleep(0.01)
        go.set()
        answers = [future.result() for future in (first, *others)]
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 3
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert "too many requests" in refusal(refused, 503)
        assert refused.headers["retry-after"] == "1"


def test_an_index_that_changes_is_answered_from_whole(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are added and removed under four clients, who always see one generation, none mixed."""
    monkeypatch.setattr(serve_app, "WATCH_SECONDS", 0.01)
    for number in range(3):
        name = f"{number:05d}.tar"
        (tmp_path / f"shards{number}").mkdir()
        (tmp_path / f"shards{number}" / name).write_bytes((shards / name).read_bytes())
    path = tmp_path / "index"
    build_index(model, tmp_path / "shards0", path, workers=0)
    captions_of = {Opened(path).version: captions(path)}
    stop = threading.Event()
    seen = set[str]()

    def one_client(server: Server) -> None:
        with httpx.Client(base_url=server.address, timeout=60) as client:
            while not stop.is_set():
                body = {"image": image_field(picture(3)), "num_images": 100}
                answer = client.post("/knn-service", json=body)
                hits, version = answer.json(), answer.headers["index-version"]
                seen.add(version)
                expected = captions_of[version]
                assert sorted(hit["id"] for hit in hits) == list(range(len(expected)))
                assert all(hit["caption"] == expected[hit["id"]] for hit in hits)
                assert hits[0]["similarity"] == pytest.approx(1, abs=1e-3)

    with running({"changing": path}) as server, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(one_client, server) for _ in range(4)]
        changes: list[Callable[[Path], Any]] = [
            lambda index: append(None, tmp_path / "shards1", index, workers=0),
            lambda index: remove(index, ["000000000", "000010000"]),
            lambda index: append(None, tmp_path / "shards2", index, workers=0),
        ]
        try:
            for number, change in enumerate(changes):
                # what it will hold is known before anybody can meet it
                copy = shutil.copytree(path, tmp_path / f"copy{number}")
                change(copy)
                new = Opened(copy).version
                captions_of[new] = captions(copy)
                change(path)
                assert Opened(path).version == new
                wait_until(lambda new=new: new in seen or any(c.done() for c in clients))
        finally:
            stop.set()
        for client in clients:
            client.result()
        assert seen == set(captions_of)


def captions(path: Path) -> list[str]:
    index = Index(path)
    return [index.row(row)["caption"] for row in range(len(index))]


def test_an_index_of_another_model_is_not_taken_up(
    index: Path,
    other_model: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(serve_app, "WATCH_SECONDS", 0.01)
    path = shutil.copytree(index, tmp_path / "index")
    build_index(other_model, shards, tmp_path / "other", workers=0)
    with running({"a": path}) as server, httpx.Client(base_url=server.address) as client:
        before = client.post("/knn-service", json={"text": "cat"}).json()
        path.rename(tmp_path / "old")
        wait_until(lambda: "is no index" in caplog.text)
        (tmp_path / "other").rename(path)
        wait_until(lambda: "another model's now" in caplog.text)
        assert client.post("/knn-service", json={"text": "cat"}).json() == before
        assert caplog.text.count("another model's now") == 1


def test_the_device_is_the_searchs_too(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Told(Index):
        def __init__(self, path: Path, device: str = "cpu") -> None:
            asked.append(device)
            super().__init__(path)

    monkeypatch.setattr(serve_index, "Index", Told)
    served = ServedIndex(shutil.copytree(index, tmp_path / "index"), None, "auto", 0.94)
    remove(tmp_path / "index", ["000000000"])
    served.refresh()
    assert asked == ["auto", "auto"]
    assert len(served.now.index) == 39


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise TimeoutError("waited for 30 seconds")


# What is refused ----------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 90_000, "no JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "found none"),
        (b'{"text": "cat", "id": 1}', "found text and id"),
        (b'{"text": 3}', "text: expected 1 to"),
        (b'{"text": " "}', "text: expected 1 to"),
        (b'{"text": "' + b"x" * 2001 + b'"}', "text: expected 1 to"),
        (b'{"text": "\\ud800"}', "whole Unicode"),
        (b'{"text": "cat", "indice_name": "laion"}', "no index here; there are: tiny, again"),
        (b'{"text": "cat", "indice_name": ["tiny"]}', "no index here"),
        (b'{"text": "cat", "modality": "text"}', "modality"),
        (b'{"text": "cat", "use_mclip": true}', "use_mclip"),
        (b'{"text": "cat", "num_images": 0}', "num_images: '0'"),
        (b'{"text": "cat", "num_images": 1e99}', "num_images"),
        (b'{"text": "cat", "num_images": true}', "num_images"),
        (b'{"text": "cat", "num_result_ids": 3001}', "from 1 to 3000"),
        (b'{"text": "cat", "num_images": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"image_url": "http://127.0.0.1/x.jpg"}', "fetches no addresses"),
        (b'{"image": "?"}', "base64"),
        (b'{"image": 7}', "base64"),
        (b'{"image": ""}', "not a readable image"),
        (b'{"image": "%s"}' % base64.b64encode(b"GIF89a" + b"\0" * 50), "not a readable image"),
        (b'{"embedding_input": [1, 2]}', "a list of 32 finite"),
        (b'{"embedding_input": "abc"}', "a list of 32 finite"),
        (b'{"embedding_input": [%s]}' % b", ".join([b"NaN"] * 32), "a list of 32 finite"),
        (b'{"embedding_input": [%s]}' % b", ".join([b"0"] * 32), "not all zero"),
        (b'{"id": 40}', "from 0 to 39"),
        (b'{"id": -1}', "from 0 to 39"),
        (b'{"id": 1.5}', "from 0 to 39"),
    ],
)
def test_malformed_questions(client: httpx.Client, body: bytes, message: str) -> None:
    assert message in refusal(client.post("/knn-service", content=body), 400)
    assert ask(client, text="cat")  # nothing is harmed


def test_malformed_metadata_requests(client: httpx.Client) -> None:
    for ids in (None, 3, [40], ["1"], [1] * 3001):
        assert "ids" in refusal(client.post("/metadata", json={"ids": ids}), 400)
    stale = client.post("/metadata", json={"ids": [1], "version": "of old"})
    assert "search again" in refusal(stale, 409)


def test_wrong_addresses_and_methods(client: httpx.Client) -> None:
    assert "/nothing" in refusal(client.get("/nothing"), 404)
    assert "GET /knn-service" in refusal(client.get("/knn-service"), 405)
    refusal(client.get("/image/tiny/x"), 404)
    assert client.get("/../../etc/passwd").status_code == 404


def test_oversized(client: httpx.Client) -> None:
    large = json.dumps({"text": "x" * 200_000}).encode()
    assert "100,000 bytes" in refusal(client.post("/knn-service", content=large), 413)
    chunks = (large[at : at + 1000] for at in range(0, len(large), 1000))  # without a length
    assert "100,000 bytes" in refusal(client.post("/knn-service", content=chunks), 413)
    for width in (8_000, 14_000):  # a few kilobytes that would be 64 and 196 million pixels
        bomb = {"image": image_field(png(width, width))}
        assert "50,000,000 pixels" in refusal(client.post("/knn-service", json=bomb), 413)
    assert ask(client, text="cat")


def test_too_many_uploads_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_requests, "ALL_BODIES", 1)
    with running({"tiny": index}, max_body=1000) as server:
        with begun_request(server, b'{"text": "' + b"x" * 800):
            time.sleep(0.5)
            body = json.dumps({"text": "x" * 900}).encode()
            refusal(httpx.post(f"{server.address}/knn-service", content=body), 503)
        assert httpx.post(f"{server.address}/knn-service", json={"text": "cat"}).status_code == 200


@contextmanager
def begun_request(
    server: Server, sent: bytes, head: bytes | None = None
) -> Iterator[socket.socket]:
    """A connection on which a request has begun, with 900 bytes of body promised."""
    with socket.create_connection(server.listening.getsockname(), timeout=20) as connection:
        start = b"POST /knn-service HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
        connection.sendall((start if head is None else head) + sent)
        yield connection


def test_slow_requests(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_requests, "BODY_SECONDS", 0.8)
    monkeypatch.setattr(serving, "REQUEST_SECONDS", 1.2)
    with running({"tiny": index}, max_body=1000) as server:
        with begun_request(server, b'{"text":') as slow_body:
            answer = read_all(slow_body)  # answered, and closed
        assert b" 408 " in answer.splitlines()[0]
        assert b"did not arrive in 0.8 seconds" in answer
        with begun_request(server, b"", head=b"GET / HTTP/1.1\r\nHost: loc") as slow_head:
            assert read_all(slow_head) == b""
        with begun_request(server, b"", head=b"") as silent:
            assert read_all(silent) == b""
        # a refused body that never ends is not read for ever
        head = b"POST /knn-service HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
        with begun_request(server, b"x", head=head) as endless:
            assert b" 413 " in read_all(endless).splitlines()[0]
        # a kept connection is not one of them
        with httpx.Client(base_url=server.address) as client:
            for _ in range(3):
                assert ask(client, text="cat")
                time.sleep(0.5)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):  # closed with something of ours unread
        while chunk := connection.recv(65536):
            found += chunk
    return found


def test_garbage_is_no_http(server: Server, client: httpx.Client) -> None:
    with begun_request(server, b"", head=b"\x16\x03\x01 hello\r\n\r\n") as connection:
        assert b" 400 " in read_all(connection).splitlines()[0]
    with begun_request(server, b"", head=b"GET /" + b"a" * 200_000) as connection:
        assert b" 200 " not in read_all(connection)
    assert ask(client, text="cat")


def test_a_client_that_leaves(server: Server, client: httpx.Client) -> None:
    for _ in range(5):
        with begun_request(server, b'{"text":'):
            pass
    assert ask(client, text="cat")


def test_foreign_names_are_refused(server: Server, client: httpx.Client) -> None:
    """A page elsewhere can point its own name at 127.0.0.1; it gets nothing."""
    assert client.get("/indices-list", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/indices-list", headers={"Host": "localhost:80"}).status_code == 200
    assert server.listening.getsockname()[0] == "127.0.0.1"


def test_headers_of_every_answer(client: httpx.Client) -> None:
    for path in ("/", "/page.js", "/image/tiny/0", "/nothing", "/indices"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_a_bug_is_told_and_survived(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("bug")

    with running({"tiny": index}) as server, httpx.Client(base_url=server.address) as client:
        with monkeypatch.context() as patch:
            patch.setattr(serve_app.ServedIndex, "answer", broken)
            answer = client.post("/knn-service", json={"text": "cat"})
            assert "KeyError on the server" in refusal(answer, 500)
        assert ask(client, text="cat")


# Starting -----------------------------------------------------------------------------------------


def test_what_cannot_be_served(index: Path, other_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="is no index"):
        make_server({"a": tmp_path}, port=0)
    with pytest.raises(RetrievalError, match="is not the model of"):
        make_server({"a": index}, port=0, model=other_model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RetrievalError, match=f"127.0.0.1:{port}: .* --port"):
            make_server({"a": index}, port=port)


def test_what_is_being_answered_is_finished(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Event()
    answer = serve_app.ServedIndex.answer

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return answer(*arguments)

    monkeypatch.setattr(serve_app.ServedIndex, "answer", slow)
    with ThreadPoolExecutor(1) as pool, running({"tiny": index}) as server:
        url = f"{server.address}/knn-service"
        last = pool.submit(httpx.post, url, json={"text": "cat"}, timeout=30)
        assert begun.wait(30)
        server.should_exit = True
        wait_until(lambda: refuses(server))
        go.set()
        assert last.result().status_code == 200


def refuses(server: Server) -> bool:
    try:
        socket.create_connection(server.listening.getsockname(), timeout=5).close()
    except OSError:
        return True
    return False


def test_the_command_names_its_indexes(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)  # this process keeps its own
    served: list[Any] = []

    def refuse(indexes: dict[str, Path], **options: Any) -> Server:
        served.append((indexes, options))
        raise RetrievalError("the port is taken")

    monkeypatch.setattr(serving, "make_server", refuse)
    run = CliRunner().invoke(main, ["serve", str(index), f"b={index}", "--max-body", "1M"])
    assert (run.exit_code, run.stdout) == (1, "")
    assert run.stderr == "Error: the port is taken\n"
    ((indexes, options),) = served
    assert indexes == {"tiny": index, "b": index}
    assert (options["host"], options["port"], options["max_body"]) == ("127.0.0.1", 1234, 1 << 20)
    for arguments in ([], [str(index), str(index)], [f"a/b={index}"], [str(index), "--fold", "0"]):
        assert CliRunner().invoke(main, ["serve", *arguments]).exit_code == 2
