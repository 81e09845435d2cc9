"""The service's addresses: clip-retrieval's own, the pictures, and the page.

    POST /knn-service       a question (serve_requests.parse_question) -> [{id, similarity, ...}]
    POST /metadata          {indice_name, ids} -> [{id, metadata}]
    GET  /indices-list      names
    GET  /metrics           for Prometheus; /metrics-summary for people
    GET  /indices           [{name, images, version}], for the page
    GET  /image/NAME/ROW    a picture as it is in its shard; /thumbnail/NAME/ROW, a small one
    GET  /                  the page

Every error is {"error": one line}. An id, a row number, means the same picture for as long as an
index's version stays the same: answers carry it (Index-Version), and a request for metadata that
names another one is refused (409).
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.resources import files
from time import perf_counter
from typing import Any

import anyio
from anyio.to_thread import run_sync
from clip_models import ImageError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_retrieval.errors import RetrievalError
from clip_retrieval.pictures import media_type, tile
from clip_retrieval.query import to_json
from clip_retrieval.serve_batches import Batches, QueueFullError
from clip_retrieval.serve_index import Answer, ServedIndex, describe
from clip_retrieval.serve_metrics import Metrics
from clip_retrieval.serve_requests import (
    Bodies,
    Question,
    RefusedError,
    bad,
    busy,
    parse_object,
    parse_question,
    parse_rows,
)

log = logging.getLogger(__name__)

WAITING = 512  # questions in the queue; a picture among them takes 150 KB
BATCH = 64  # questions answered together
DECODERS = 2  # pictures decoded at a time
WATCH_SECONDS = 1.0  # between two looks at whether an index has been replaced

# What clip-retrieval's client always sends, for models that are not here.
_IGNORED = ("use_safety_model", "use_violence_detector", "aesthetic_score", "aesthetic_weight")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}


class Service:
    """The endpoints over some indexes; the first is asked where a request names none.

    Args:
        served: name -> index.
        largest_body: bytes of a request, at most.
    """

    def __init__(self, served: Mapping[str, ServedIndex], largest_body: int) -> None:
        self._served = served
        self._batches = Batches[Question, Answer](self._answer, waiting=WAITING, size=BATCH)
        self._metrics = Metrics(self._batches.waiting)
        self._bodies = Bodies(largest_body)
        self._decoders = anyio.CapacityLimiter(DECODERS)

    def app(self, hosts: Sequence[str]) -> Starlette:
        """The ASGI application.

        Args:
            hosts: names that a request may call this server by; "*" for any. On loopback, others
                are those of a foreign page whose name was made to point here.
        """
        routes = [
            Route("/knn-service", self.knn, methods=["POST"]),
            Route("/metadata", self.metadata, methods=["POST"]),
            Route("/indices-list", self.indices_list),
            Route("/indices", self.indices),
            Route("/image/{name}/{row:int}", self.image),
            Route("/thumbnail/{name}/{row:int}", self.thumbnail),
            Route("/metrics", self.metrics),
            Route("/metrics-summary", self.metrics_summary),
            *(Route(path, _page(*file)) for path, file in _PAGE.items()),
        ]
        return Starlette(
            routes=routes,
            lifespan=self._lifespan,
            middleware=[
                Middleware(_Counted, metrics=self._metrics, paths={r.path for r in routes}),
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            ],
            exception_handlers={
                RefusedError: _refused,
                HTTPException: _http_error,
                ClientDisconnect: _gone,
                Exception: _bug,
            },
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        tasks = [asyncio.create_task(self._batches.run()), asyncio.create_task(self._watch())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Put an index that was appended to in the place of the old one, while that answers."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for served in self._served.values():
                await run_sync(served.refresh)

    def _answer(self, questions: Sequence[Question]) -> list[Answer | RefusedError]:
        """In the search thread: each index's questions together."""
        self._metrics.batch.observe(len(questions))
        answers = dict[int, Answer | RefusedError]()
        for name, served in self._served.items():
            asked = {q: question for q, question in enumerate(questions) if question.index == name}
            if asked:
                found = served.answer(list(asked.values()), self._metrics)
                answers |= zip(asked, found, strict=True)
        return [answers[q] for q in range(len(questions))]

    # -- clip-retrieval's addresses

    async def knn(self, request: Request) -> Response:
        """Hits of a question, the first `num_images` with their metadata."""
        began = perf_counter()
        async with self._bodies.read(request) as body:
            found = parse_object(body)
            name, served = self._find(found.get("indice_name"))
            index, preprocess = served.now.index, served.loaded.preprocess
            arguments = (found, name, len(index), index.facts["dim"], preprocess)
            if found.get("image"):
                with self._metrics.steps["image_prepro_time"].time():
                    question = await run_sync(parse_question, *arguments, limiter=self._decoders)
            else:
                question = parse_question(*arguments)
        try:
            answer = await self._batches.ask(question)
        except QueueFullError:
            raise busy() from None
        self._metrics.steps["full_knn_request_time"].observe(perf_counter() - began)
        headers = {"Index-Version": answer.version}
        if ignored := [field for field in _IGNORED if found.get(field)]:
            headers["Ignored"] = ", ".join(ignored)
        return Response(answer.hits, media_type="application/json", headers=headers)

    async def metadata(self, request: Request) -> Response:
        """Metadata of rows; with a "version", only if they are still that version's."""
        async with self._bodies.read(request) as body:
            found = parse_object(body)
        now = self._find(found.get("indice_name"))[1].now
        if found.get("version") not in (None, now.version):
            raise RefusedError(HTTPStatus.CONFLICT, "the index has been replaced; search again")
        rows = parse_rows(found, len(now.index))
        described = await run_sync(
            lambda: to_json([{"id": row, "metadata": describe(now.index, row)} for row in rows])
        )
        headers = {"Index-Version": now.version}
        return Response(described, media_type="application/json", headers=headers)

    async def indices_list(self, _: Request) -> Response:
        """The names, the first one first."""
        return JSONResponse(list(self._served))

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def metrics_summary(self, _: Request) -> Response:
        """For people."""
        return PlainTextResponse(self._metrics.summary())

    # -- what the page needs besides

    async def indices(self, _: Request) -> Response:
        """Names, counts and versions."""
        rows = [(name, served.now) for name, served in self._served.items()]
        return JSONResponse(
            [{"name": n, "images": len(now.index), "version": now.version} for n, now in rows]
        )

    async def image(self, request: Request) -> Response:
        """The picture of a row as it is stored."""
        return await self._picture(request, small=False)

    async def thumbnail(self, request: Request) -> Response:
        """A small picture of a row."""
        return await self._picture(request, small=True)

    async def _picture(self, request: Request, *, small: bool) -> Response:
        now = self._find(request.path_params["name"])[1].now
        index = now.index
        row: int = request.path_params["row"]
        if row >= len(index):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{row} is none of {len(index):,} pictures")
        # named with its version an address means one picture for ever
        named = request.query_params.get("v") == now.version
        tag = f'"{now.version}"'
        headers = {
            "Cache-Control": "private, max-age=31536000, immutable" if named else "no-cache",
            "ETag": tag,
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)

        def read() -> bytes:
            return (index.thumbnail(row) or tile(index.image(row))) if small else index.image(row)

        try:
            data = await run_sync(read, limiter=self._decoders if small else None)
        except (RetrievalError, ImageError, OSError) as error:
            raise RefusedError(HTTPStatus.NOT_FOUND, str(error)) from error
        return Response(data, media_type=media_type(data), headers=headers)

    def _find(self, name: Any) -> tuple[str, ServedIndex]:
        if name is None:
            name = next(iter(self._served))
        if not isinstance(name, str) or name not in self._served:
            raise bad(f"{str(name)[:40]!r} is no index here; there are: {', '.join(self._served)}")
        return name, self._served[name]


def _page(file: str, kind: str) -> Any:
    """An endpoint that gives one of the page's files."""
    data = files("clip_retrieval").joinpath(file).read_bytes()
    headers = {"Cache-Control": "no-cache", "ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return endpoint


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = route.path if route else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)


async def _refused(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RefusedError) else HTTPStatus.BAD_REQUEST
    headers = {}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    if status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"
    return JSONResponse({"error": str(error)}, status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it


async def _bug(request: Request, error: Exception) -> Response:
    message = f"{request.url.path}: {type(error).__name__} on the server"
    return JSONResponse({"error": message}, 500, {"Connection": "close"})  # as uvicorn will
