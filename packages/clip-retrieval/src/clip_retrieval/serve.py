"""`serve`: indexes over HTTP, with a page, until it is told to stop."""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from clip_retrieval.errors import RetrievalError
from clip_retrieval.serve_app import Service
from clip_retrieval.serve_index import ServedIndex

REQUEST_SECONDS = 15.0  # from a request's first byte to its last; serve_requests is stricter
CONNECTIONS = 1_000
LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1"]

# the page runs its own script, shows our pictures, and talks to nobody else
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def serve(indexes: Mapping[str, Path], **options: Any) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are being answered are finished first.

    Prints {"address", "indexes"} when it is ready. Arguments are those of `make_server`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)  # uvicorn raises it again once it has shut down
    server = make_server(indexes, **options)
    with server.listening:
        server.run([server.listening])


def make_server(
    indexes: Mapping[str, Path],
    *,
    model: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 1234,
    fold: float = 0.94,
    max_body: int = 16 << 20,
    device: str = "auto",
) -> "Server":
    """A server that listens, but does not run yet.

    Args:
        indexes: name -> index directory.
        model: in place of the model directories that the indexes name.
        port: 0 for any that is free.
        fold: cosine similarity from which a hit is a duplicate of a better one.
        max_body: bytes of a request, at most.

    Raises:
        RetrievalError: no index, another model than an index's, an address that is taken.
    """
    listening = _listen(host, port)
    try:
        served = {n: ServedIndex(path, model, device, fold) for n, path in indexes.items()}
    except BaseException:  # Ctrl-C too: it is raised again, and the address is free
        listening.close()
        raise
    config = uvicorn.Config(
        Service(served, max_body).app(LOOPBACK if host in LOOPBACK else ["*"]),
        http=_Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        headers=list(_HEADERS.items()),
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    return Server(config, listening, {name: len(s.now.index) for name, s in served.items()})


class Server(uvicorn.Server):
    """Says on stdout that it is ready, once it is.

    Attributes:
        listening: its socket.
        address: where it is to be found.
    """

    def __init__(
        self, config: uvicorn.Config, listening: socket.socket, counts: Mapping[str, int]
    ) -> None:
        super().__init__(config)
        self.listening, self._counts = listening, counts
        host, port = listening.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, and a line of JSON."""
        await super().startup(sockets)
        print(json.dumps({"address": self.address, "indexes": self._counts}), flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        problem = f"{host}:{port}: {error.strerror or error}; give another --port, or 0 for any"
        raise RetrievalError(problem) from error


class _Protocol(H11Protocol):
    """uvicorn waits for ever for a request that has begun; here its connection is closed."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:  # between two requests
            self._expect_request()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _expect_request(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._close_if_late, self.cycle)

    def _close_if_late(self, last: Any) -> None:
        no_head = self.conn.their_state is h11.IDLE and self.cycle is last
        if no_head or self.conn.their_state is h11.SEND_BODY:
            self.transport.close()
