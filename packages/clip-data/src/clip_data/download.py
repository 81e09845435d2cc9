"""Images that are addresses: downloaded ahead of their turn, by an event loop in a thread."""

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Self

from clip_data.errors import DataError, RowError
from clip_data.samples import Row

if TYPE_CHECKING:
    from clip_data.http_client import Client

# One dead host may hold up the row whose turn it is for half a minute: what lies behind it must
# reach far, and be bounded by its bytes.
_ROWS_AHEAD = 4096
_BYTES_AHEAD = 1 << 28
_STARTED_PER_CONNECTION = 4  # those that wait for their host or for another try need none

_DIGESTS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the length in hexadecimal


@dataclass(frozen=True)
class DownloadOptions:
    """How images are downloaded. The limits hold for each worker."""

    timeout: float = 10.0
    """Seconds, for one request from the connection to the last byte."""
    retries: int = 2
    """After failures that may pass: no connection, time-outs, status 408, 425, 429 and 5xx."""
    connections: int = 64
    """Requests at once."""
    per_host: int = 8
    """Requests at once to one host."""
    max_bytes: int = 1 << 26
    """Of an image file, its content encoding undone; a longer one makes a bad row."""
    respect_robots: bool = True
    """Whether robots.txt and the header X-Robots-Tag may forbid an image."""
    hash_column: str | None = None
    """A column with the MD5, SHA-1 or SHA-256 of each file in hexadecimal; None: unchecked."""
    user_agent: str = f"clip-data/{version('clip-data')} (builds data sets of images)"
    """What stands before the first `/` or space is its name in robots.txt and X-Robots-Tag."""

    def __post_init__(self) -> None:
        for name in ("timeout", "connections", "per_host", "max_bytes"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} {getattr(self, name)}: expected a number above 0")
        if self.retries < 0:
            raise DataError(f"retries {self.retries}: expected 0 or more")
        if not self.user_agent.isprintable() or not self.user_agent.strip():
            raise DataError(f"user_agent {self.user_agent!r}: expected a line of text")


@dataclass(frozen=True)
class UrlReader:
    """Images that are http or https addresses."""

    options: DownloadOptions

    def images(self, rows: Sequence[Row]) -> Generator[Callable[[], bytes]]:
        """See `Reader`. Close the iterator to stop early: it cancels what is under way."""
        waiting: deque[Callable[[], bytes]] = deque()
        with _loop_in_thread() as loop:
            ahead = asyncio.run_coroutine_threadsafe(_Ahead.open(self.options), loop).result()
            try:
                for number, row in enumerate(rows):
                    if len(waiting) == _ROWS_AHEAD:
                        loop.call_soon_threadsafe(ahead.hand_over)
                        yield waiting.popleft()
                    download = ahead.download(number, row.image)
                    future = asyncio.run_coroutine_threadsafe(download, loop)
                    waiting.append(partial(_take, future, row, self.options.hash_column))
                while waiting:
                    loop.call_soon_threadsafe(ahead.hand_over)
                    yield waiting.popleft()
                asyncio.run_coroutine_threadsafe(_others(cancel=False), loop).result()
            finally:
                asyncio.run_coroutine_threadsafe(ahead.close(), loop).result()

    def version(self, row: Row) -> None:
        """Nothing is known of an image without downloading it."""


class _Ahead:
    """Starts downloads in the order of their rows; lives in the loop.

    Rows wait to start while the images that are not handed over yet fill `_BYTES_AHEAD`. As they
    start in order, the row whose turn it is never waits for those behind it.
    """

    def __init__(self, client: "Client", connections: int) -> None:
        self._client = client
        self._order = asyncio.Lock()  # fair: first come, first served
        self._started = asyncio.Semaphore(_STARTED_PER_CONNECTION * connections)
        self._room = asyncio.Event()
        self._room.set()
        self._held: dict[int, int] = {}  # bytes of images by the number of their row
        self._held_bytes = 0
        self._handed_over = 0

    @classmethod
    async def open(cls, options: DownloadOptions) -> Self:
        """The client is opened within the running loop."""
        from clip_data.http_client import Client  # aiohttp takes a while to import

        return cls(Client(options), options.connections)

    async def download(self, number: int, address: str) -> bytes | RowError:
        """The image of the row of that number, or why there is none."""
        async with self._order:
            await self._started.acquire()
            await self._room.wait()
        try:
            data = await self._client.fetch(address)
        except RowError as error:
            # without its traceback, whose frames hold what had come of the body
            return RowError(error.reason, error.detail)
        finally:
            self._started.release()
        if number >= self._handed_over:
            self._held[number] = len(data)
            self._hold(len(data))
        return data

    def hand_over(self) -> None:
        """The next row's image is its user's from here on, downloaded or not."""
        self._hold(-self._held.pop(self._handed_over, 0))
        self._handed_over += 1

    async def close(self) -> None:
        """Cancel the downloads under way, and wait until nothing of them is left."""
        await _others(cancel=True)
        await self._client.close()

    def _hold(self, n: int) -> None:
        self._held_bytes += n
        if self._held_bytes < _BYTES_AHEAD:
            self._room.set()
        else:
            self._room.clear()


@contextmanager
def _loop_in_thread() -> Generator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="clip-data downloads", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _others(*, cancel: bool) -> None:
    """Wait for all other tasks of the loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        if cancel:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _take(future: Future[bytes | RowError], row: Row, hash_column: str | None) -> bytes:
    result = future.result()
    if isinstance(result, RowError):
        raise result
    if hash_column is not None:
        expected = str((row.extra or {}).get(hash_column)).strip().lower()
        kind = _DIGESTS.get(len(expected))
        if kind is None:
            raise RowError("hash differs", f"{expected!r} is no MD5, SHA-1 or SHA-256")
        found = hashlib.new(kind, result, usedforsecurity=False).hexdigest()
        if found != expected:
            raise RowError("hash differs", f"{kind} {found}, expected {expected}")
    return result
