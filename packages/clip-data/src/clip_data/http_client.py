"""One address after another, politely: tries, redirects, limits per host, and robots.

robots.txt as in RFC 9309; X-Robots-Tag as Google documents it, its words as img2dataset takes them.
"""

import asyncio
import re
import socket
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from itertools import count
from random import uniform
from weakref import WeakValueDictionary

import aiohttp
from protego import Protego
from yarl import URL

from clip_data.download import DownloadOptions
from clip_data.errors import RowError

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_MAY_PASS = (408, 425, 429)
_BACK_OFF = 1.0  # seconds after the first failure, doubled after each
_PATIENCE = 60.0  # seconds: no try is put off for longer
_ROBOTS_BYTES = 500 * 1024  # of a robots.txt: RFC 9309, 2.5
_HOSTS = 1000  # that many rows after its last, a host is forgotten
_KEEP_ALIVE = 1.0  # seconds: idle connections to thousands of hosts would use up the descriptors
_HEADER_BYTES = 1 << 16

_FORBIDDING = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_ENCODED = re.compile(r"(?:[\w.~:/?#\[\]@!$&'()*+,;=-]|%[0-9a-f]{2})+", re.ASCII | re.IGNORECASE)


class _PassingError(RowError):
    """A failure that may pass."""

    def __init__(self, reason: str, detail: str = "", wait: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.wait = wait  # seconds, as the host asks


class _Host:
    """What is known of a host."""

    def __init__(self, connections: int) -> None:
        self.connections = asyncio.Semaphore(connections)
        self.lock = asyncio.Lock()  # of robots
        self.robots: dict[URL, Protego | RowError] = {}  # by origin
        self._open_at, self._closed_by = 0.0, ""

    def pause(self, seconds: float, reason: str) -> None:
        """No request for so long."""
        self._open_at = max(self._open_at, time.monotonic() + seconds)
        self._closed_by = reason

    async def wait(self) -> None:
        """Until the pause is over.

        Raises:
            RowError: that is too long.
        """
        while (seconds := self._open_at - time.monotonic()) > 0:
            if seconds > _PATIENCE:
                raise RowError(self._closed_by, f"to be tried again in {seconds:.0f} s")
            await asyncio.sleep(seconds)


class Client:
    """Downloads within the running loop."""

    def __init__(self, options: DownloadOptions) -> None:
        self._options = options
        self._token = re.split(r"[/\s]", options.user_agent.strip())[0].lower()
        self._connections = asyncio.Semaphore(options.connections)
        self._hosts = WeakValueDictionary[str, _Host]()
        self._recent = deque[_Host](maxlen=_HOSTS)
        # a name is resolved in a thread, which a dead name server holds up for long
        names = ThreadPoolExecutor(options.connections, "clip-data names")
        asyncio.get_running_loop().set_default_executor(names)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_ALIVE, ttl_dns_cache=300
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": options.user_agent},
            timeout=aiohttp.ClientTimeout(total=options.timeout),
            trust_env=True,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
        )

    async def close(self) -> None:
        """End the connections and the threads."""
        await self._session.close()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def fetch(self, address: str) -> bytes:
        """The body.

        Raises:
            RowError: there is none, or it may not be taken.
        """
        return await self._follow(_parse(address), image=True)

    async def _follow(self, url: URL, *, image: bool) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            host = self._host(url)
            if image and self._options.respect_robots:
                await self._ask_robots(host, url)
            answer = await self._get(host, url, image)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise RowError("too many redirects", str(url))

    async def _get(self, host: _Host, url: URL, image: bool) -> bytes | URL:
        """The body, or where it is to be found; tried as often as the options say."""
        for attempt in count():
            try:
                return await self._try(host, url, image)
            except _PassingError as failure:
                delay = uniform(0.5, 1.0) * min(_BACK_OFF * 2**attempt, _PATIENCE)
                if failure.wait > 0 or failure.reason == "http 429":
                    host.pause(max(delay, failure.wait), failure.reason)
                if attempt == self._options.retries:
                    raise
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    async def _try(self, host: _Host, url: URL, image: bool) -> bytes | URL:
        async with host.connections:
            await host.wait()
            async with self._connections:
                try:
                    async with self._session.get(url, allow_redirects=False) as response:
                        return await self._read(response, image)
                except TimeoutError as error:
                    limit = f"{self._options.timeout:g} s"
                    raise _PassingError("timeout", f"{url}: {limit}") from error
                except ValueError as error:  # what no host can be called
                    raise RowError("not an http address", f"{url}: {error}") from error
                except aiohttp.ClientPayloadError as error:
                    raise _PassingError("body cut short", f"{url}: {error}") from error
                except (aiohttp.ClientError, OSError) as error:
                    lasting = isinstance(error, aiohttp.ClientConnectorCertificateError) or (
                        isinstance(error, OSError) and error.errno == socket.EAI_NONAME
                    )
                    failure = RowError if lasting else _PassingError
                    raise failure("connection failed", f"{url}: {error!r}") from error

    async def _read(self, response: aiohttp.ClientResponse, image: bool) -> bytes | URL:
        status, headers = response.status, response.headers
        if status in _REDIRECTS and "Location" in headers:
            return _parse(headers["Location"], response.url)
        if status in _MAY_PASS or status >= 500:
            wait = _seconds(headers.get("Retry-After", ""))
            raise _PassingError(f"http {status}", str(response.url), wait)
        if not 200 <= status < 300:
            raise RowError(f"http {status}", str(response.url))
        if image and self._options.respect_robots:
            tags = headers.getall("X-Robots-Tag", ())
            if _forbids(tags, self._token):
                raise RowError("robots: not allowed", f"X-Robots-Tag: {', '.join(tags)}")
        body, limit = bytearray(), self._options.max_bytes if image else _ROBOTS_BYTES
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > limit and image:
                raise RowError("body too large", f"more than {limit} bytes")
            if len(body) > limit:
                break
        return bytes(body[:limit])

    def _host(self, url: URL) -> _Host:
        name = (url.host or "").lower()
        host = self._hosts.get(name) or _Host(self._options.per_host)
        self._hosts[name] = host
        self._recent.append(host)
        return host

    async def _ask_robots(self, host: _Host, url: URL) -> None:
        origin = url.origin()
        async with host.lock:
            robots = host.robots.get(origin)
            if robots is None:
                robots = host.robots[origin] = await self._robots(origin / "robots.txt")
        if isinstance(robots, RowError):
            raise RowError(robots.reason, robots.detail)
        if not robots.can_fetch(str(url), self._token):
            raise RowError("robots: not allowed", f"{origin}/robots.txt")

    async def _robots(self, url: URL) -> Protego | RowError:
        """RFC 9309, 2.3.1: what is not there allows all, a host that fails allows nothing."""
        try:
            text = await self._follow(url, image=False)
        except RowError as error:
            if error.reason.startswith("http 5"):
                return RowError("robots: not allowed", f"{url}: {error.reason}")
            if error.reason in ("timeout", "connection failed", "body cut short"):
                return RowError(error.reason, error.detail)
            text = b""
        return Protego.parse(text.decode("utf-8-sig", "replace"))


def _parse(address: str, base: URL | None = None) -> URL:
    """What is a valid URL is left as it stands; else it is encoded where it must be."""
    address = address.strip()
    try:
        url = URL(address, encoded=_ENCODED.fullmatch(address) is not None)
        url = url if base is None else base.join(url)
        if url.scheme in ("http", "https") and url.host and url.port:
            return url
    except ValueError as error:
        raise RowError("not an http address", f"{address}: {error}") from error
    raise RowError("not an http address", address)


def _seconds(retry_after: str) -> float:
    """Of a number, or until a date; 0 of anything else."""
    try:
        if retry_after.isdecimal():
            return float(retry_after)
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def _forbids(tags: Iterable[str], token: str) -> bool:
    """Whether X-Robots-Tag headers such as `noai` or `somebot: noai, noindex` speak against us."""
    for tag in tags:
        ours = True
        for part in tag.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _WITH_VALUE and re.fullmatch(r"[a-z_-]+|\*", name):
                ours = name in ("*", token)
                name = rest
            if ours and name in _FORBIDDING:
                return True
    return False
