"""Downloads from a server of our own, which misbehaves in every way it is asked to."""

import gc
import gzip
import hashlib
import logging
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest
from clip_data import download, http_client
from clip_data.download import DownloadOptions, UrlReader
from clip_data.errors import DataError, RowError
from clip_data.http_client import Client
from clip_data.samples import Row

BODY = bytes(range(256)) * 20


class Server(ThreadingHTTPServer):
    """Answers as the path says; remembers what was asked and how much at once."""

    request_queue_size = 200
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.robots: tuple[int, bytes] = (404, b"")
        self.seen = Counter[str]()
        self.headers: list[Any] = []
        self.at_once, self.most = 0, 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are expected."""


class Handler(BaseHTTPRequestHandler):
    """The first part of the path is what is wrong."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Be silent."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        lengths = {} if "Content_Length" in headers else {"Content_Length": str(len(body))}
        for name, value in {**lengths, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server = cast(Server, self.server)
        with server.lock:
            server.seen[self.path] += 1
            server.headers.append(self.headers)
            server.at_once += 1
            server.most = max(server.most, server.at_once)
            nth = server.seen[self.path]
        try:
            self.misbehave(server, nth)
        finally:
            with server.lock:
                server.at_once -= 1

    def misbehave(self, server: Server, nth: int) -> None:
        what, _, rest = self.path[1:].partition("/")
        match what:
            case "robots.txt":
                if server.robots[0]:
                    self.answer(*server.robots)
                else:
                    self.close_connection = True
            case "stall":
                time.sleep(0.8)
            case "drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(16):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            case "late":
                time.sleep(float(rest.partition("/")[0]))
                self.answer(200, self.path.encode())
            case "status":
                self.answer(int(rest))
            case "hop":
                left = int(rest)
                self.answer(302, Location=f"{left - 1}" if left > 1 else "/good")
            case "loop":
                self.answer(302, Location=self.path)
            case "to":
                self.answer(302, Location=rest)
            case "long":  # promises more than it sends
                self.answer(200, BODY, Content_Length=str(len(BODY) + 1))
                self.close_connection = True
            case "short":  # sends more than it promises
                self.answer(200, BODY, Content_Length="100")
            case "html":
                self.answer(200, b"<html>", Content_Type="text/html")
            case "flaky":
                self.answer(*((500,) if nth <= 2 else (200, BODY)))
            case "busy":
                wait = formatdate(time.time() + 2, usegmt=True) if rest == "date" else rest
                self.answer(*((429,) if nth == 1 else (200, BODY)), Retry_After=wait)
            case "tag":
                self.answer(200, BODY, X_Robots_Tag=rest.replace("_", " "))
            case "bomb":
                self.answer(200, gzip.compress(bytes(1 << 24)), Content_Encoding="gzip")
            case "zipped":
                self.answer(200, gzip.compress(BODY), Content_Encoding="gzip")
            case "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            case "cookie":
                self.answer(200, BODY, Set_Cookie="a=b")
            case "echo":
                self.answer(200, self.path.encode())
            case _:
                self.answer(200, BODY)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http_client, "_BACK_OFF", 0.02)


@pytest.fixture(autouse=True)
def nothing_left(caplog: pytest.LogCaptureFixture, recwarn: Any) -> Iterator[None]:
    """No thread outlives its iterator; asyncio and aiohttp have nothing to complain of."""
    with caplog.at_level(logging.WARNING):
        yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("clip-data")]
    assert not [record for record in caplog.records if record.name in ("asyncio", "aiohttp")]
    assert not [str(w.message) for w in recwarn if issubclass(w.category, ResourceWarning)]


def outcome(read: Callable[[], bytes]) -> bytes | str:
    try:
        return read()
    except RowError as error:
        return error.reason


def get(*addresses: str, extra: Any = None, **options: Any) -> list[bytes | str]:
    rows = [Row(address, extra=extra) for address in addresses]
    with closing(UrlReader(DownloadOptions(**options)).images(rows)) as reads:
        return [outcome(read) for read in reads]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("good", BODY),
        ("html", b"<html>"),
        ("zipped", BODY),
        ("flaky", BODY),
        ("hop/5", BODY),
        ("hop/6", "too many redirects"),
        ("loop", "too many redirects"),
        ("to/ftp://127.0.0.1/x", "not an http address"),
        ("to/http://127.0.0.1:99999/", "not an http address"),
        ("status/404", "http 404"),
        ("status/302", "http 302"),
        ("status/503", "http 503"),
        ("long", "body cut short"),
        ("short", BODY[:100]),
        ("bomb", "body too large"),
        ("reset", "connection failed"),
    ],
)
def test_answers(server: Server, path: str, expected: bytes | str) -> None:
    assert get(f"{server.url}/{path}", max_bytes=1 << 20) == [expected]


def test_no_answer_in_time(server: Server) -> None:
    urls = [f"{server.url}/stall", f"{server.url}/drip"]
    assert get(*urls, timeout=0.2, retries=1) == ["timeout"] * 2
    assert server.seen["/stall"] == 2


@pytest.mark.parametrize(
    ("path", "tries"),
    [
        ("status/404", 1),
        ("status/410", 1),
        ("status/408", 3),
        ("status/502", 3),
        ("bomb", 1),
        ("reset", 3),
        ("long", 3),
    ],
)
def test_only_what_may_pass_is_tried_again(server: Server, path: str, tries: int) -> None:
    get(f"{server.url}/{path}", max_bytes=1 << 20)
    # aiohttp itself asks once more when a connection is closed without an answer
    assert server.seen[f"/{path}"] in ({tries, 2 * tries} if path == "reset" else {tries})


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert get(f"http://127.0.0.1:{port}/x") == ["connection failed"]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "x.jpg",
        "//127.0.0.1/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://",
        "http:///x",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:port/",
        "http://[::1/x",
        f"http://{'a' * 70}.example/",
        "http://a..example/x",
        "http://\ud800/",
        "data:image/png,x",
    ],
)
def test_no_address(address: str) -> None:
    assert get(address) == ["not an http address"]


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/echo/a b.jpg", "/echo/a%20b.jpg"),
        ("/echo/a%20b%2Fc.jpg?q=%27%41&r=a+b", "/echo/a%20b%2Fc.jpg?q=%27%41&r=a+b"),
        ("/echo/\u00e4.jpg", "/echo/%C3%A4.jpg"),
        ("/echo/100%.jpg", "/echo/100%25.jpg"),
        ("/echo/x.jpg#part", "/echo/x.jpg"),
        ("/to//echo/ok", "/echo/ok"),
    ],
)
def test_addresses_are_encoded_once(server: Server, written: str, asked: str) -> None:
    assert get(f" {server.url}{written}\n") == [asked.encode()]


def test_credentials_and_cookies(server: Server) -> None:
    url = server.url.replace("http://", "HTTP://me:secret@")
    assert get(f"{url}/good", respect_robots=False) == [BODY]
    assert server.headers[0]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert get(f"{server.url}/cookie", f"{server.url}/cookie", connections=1) == [BODY, BODY]
    assert not any(headers["Cookie"] for headers in server.headers)
    assert server.headers[-1]["User-Agent"].startswith("clip-data/")


@pytest.mark.parametrize("wait", ["1", "date"])
def test_a_busy_host_is_left_alone(server: Server, wait: str) -> None:
    started = time.monotonic()
    assert get(f"{server.url}/busy/{wait}") == [BODY]
    assert time.monotonic() - started > 0.9  # a date has whole seconds
    assert get(f"{server.url}/busy/3600", f"{server.url}/good", per_host=1) == ["http 429"] * 2
    assert server.seen["/good"] == 0


ROBOTS = b"""User-agent: *
Disallow: /secret
User-agent: other
Disallow: /
"""


def test_robots_txt(server: Server) -> None:
    server.robots = 200, ROBOTS
    paths = ["/secret/a", "/good", "/to//secret/a", "/good/b"]
    addresses = [server.url + path for path in paths]
    no = "robots: not allowed"
    assert get(*addresses) == [no, BODY, no, BODY]
    assert server.seen["/secret/a"] == 0
    assert server.seen["/robots.txt"] == 1
    assert get(*addresses, user_agent="Other/2 x") == [no] * 4
    assert get(*addresses, respect_robots=False) == [BODY] * 4
    assert server.seen["/robots.txt"] == 2


@pytest.mark.parametrize(
    ("robots", "expected"),
    [((404, b""), BODY), ((403, b""), BODY), ((503, b""), "robots: not allowed"),
     ((0, b""), "connection failed"), ((200, b"\xff\x00<html>"), BODY),
     ((200, ROBOTS + b"#" * (1 << 20) + b"\nUser-agent: *\nDisallow: /good"), BODY)],
)  # fmt: skip
def test_robots_txt_that_is_none(
    server: Server, robots: tuple[int, bytes], expected: bytes | str
) -> None:
    server.robots = robots
    assert get(f"{server.url}/good", f"{server.url}/good") == [expected] * 2
    assert server.seen["/robots.txt"] in {0: (3, 6), 503: (3,)}.get(robots[0], (1,))


@pytest.mark.parametrize(
    ("tag", "allowed"),
    [("noai", False), ("NoImageAI", False), ("nofollow,_noindex", False), ("none", False),
     ("clip-data:_noai", False), ("*:_noimageindex", False), ("somebot:_noai,_noindex", True),
     ("somebot:_noai,_clip-data:_noai", False), ("all", True), ("max-snippet:_5,_noai", False),
     ("unavailable-after:_x", True), ("noaireally", True)],
)  # fmt: skip
def test_x_robots_tag(server: Server, tag: str, allowed: bool) -> None:
    expected = BODY if allowed else "robots: not allowed"
    assert get(f"{server.url}/tag/{tag}") == [expected]
    assert get(f"{server.url}/tag/{tag}", respect_robots=False) == [BODY]


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_hashes(server: Server, kind: str) -> None:
    digest = hashlib.new(kind, BODY).hexdigest()
    options = {"hash_column": "hash"}
    assert get(f"{server.url}/good", extra={"hash": digest.upper()}, **options) == [BODY]
    wrong = [{"hash": "0" * len(digest)}, {"hash": digest[:-1]}, {"hash": None}, {}, None]
    for extra in wrong:
        assert get(f"{server.url}/good", extra=extra, **options) == ["hash differs"]


def test_order_and_limit_per_host(server: Server) -> None:
    paths = [f"/late/{number * 7 % 5 * 0.01}/{number}" for number in range(60)]
    addresses = [server.url + path for path in paths]
    assert get(*addresses, per_host=5) == [path.encode() for path in paths]
    assert 1 < server.most <= 5
    server.most = 0
    assert get(*addresses, connections=3) == [path.encode() for path in paths]
    assert 1 < server.most <= 3


def test_functions_called_from_threads_after_the_last(server: Server) -> None:
    rows = [Row(f"{server.url}/late/0.05/{number}") for number in range(30)]
    with ThreadPoolExecutor(4) as threads:
        reads = [threads.submit(read) for read in UrlReader(DownloadOptions()).images(rows)]
    assert [r.result() for r in reads] == [f"/late/0.05/{n}".encode() for n in range(30)]


def test_few_bytes_wait_for_their_turn(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_BYTES_AHEAD", 3 * len(BODY))
    monkeypatch.setattr(download, "_STARTED_PER_CONNECTION", 1)
    rows = [Row(f"{server.url}/good/{number}") for number in range(40)]
    options = DownloadOptions(connections=2, respect_robots=False)
    with closing(UrlReader(options).images(rows)) as reads:
        taken = [next(reads)()]
        time.sleep(0.4)  # all are given the time to start
        assert sum(server.seen.values()) <= 1 + 3 + 2
        taken += [read() for read in reads]
    assert taken == [BODY] * 40
    assert sum(server.seen.values()) == 40


def test_few_rows_ahead(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_ROWS_AHEAD", 4)
    rows = [Row(f"{server.url}/good/{number}") for number in range(12)]
    with closing(UrlReader(DownloadOptions(respect_robots=False)).images(rows)) as reads:
        next(reads)
        time.sleep(0.2)
        assert sum(server.seen.values()) <= 5
        assert [read() for read in reads] == [BODY] * 11


@pytest.mark.parametrize(("hosts", "asked"), [(1, 3), (9, 2)])
def test_hosts_are_forgotten(
    server: Server, monkeypatch: pytest.MonkeyPatch, hosts: int, asked: int
) -> None:
    monkeypatch.setattr(http_client, "_HOSTS", hosts)
    monkeypatch.setattr(download, "_ROWS_AHEAD", 1)  # one after the other
    other = server.url.replace("127.0.0.1", "localhost")
    assert get(f"{server.url}/good", f"{other}/good", f"{server.url}/good") == [BODY] * 3
    assert server.seen["/robots.txt"] == asked


def test_stopped_half_way(server: Server) -> None:
    rows = [Row(f"{server.url}/{'good' if n < 2 else 'stall'}") for n in range(50)]
    with closing(UrlReader(DownloadOptions(respect_robots=False)).images(rows)) as reads:
        assert next(reads)() == BODY
        late = [next(reads), next(reads)][1]
    with pytest.raises(CancelledError):
        late()
    gc.collect()  # asyncio complains of tasks that are destroyed


def test_a_bug_is_no_bad_row(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Client, address: str) -> bytes:
        raise KeyError(address)

    monkeypatch.setattr(Client, "fetch", broken)
    with pytest.raises(KeyError):
        get(f"{server.url}/good")


def test_no_rows() -> None:
    assert get() == []


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}, {"connections": 0},
     {"per_host": 0}, {"max_bytes": 0}, {"user_agent": " "}, {"user_agent": "a\nHost: b"}],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        DownloadOptions(**options)
