"""What a request may hold, and how much of it: everything else is refused in one line.

A body has a largest size and a time to arrive in, and all bodies together have a largest size.
"""

import asyncio
import base64
import io
import json
import warnings
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import numpy as np
from clip_models import ImageError, Preprocess
from PIL import Image
from starlette.requests import Request
from torch import Tensor

from clip_retrieval.vectors import Float32, unit_rows

BODY_SECONDS = 10.0  # for a body to arrive in
ALL_BODIES = 8  # bodies of the largest size that are held at once
MAX_PIXELS = 50_000_000  # of an uploaded picture; 150 MB while it is decoded
MAX_TEXT = 2_000  # characters; a model reads 77 tokens
MAX_HITS = 3_000  # of a question, and rows of a request for metadata


class RefusedError(Exception):
    """A request that is not answered, and its HTTP status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Question:
    """One search of an index, by exactly one of text, picture, vector or row.

    Attributes:
        pixels_3SS: the picture, as `Preprocess.eval` gives it.
        vector_D: a unit vector.
        row: a picture of the index itself.
        hits: how many to find, at most.
        described: how many of them come with their metadata.
        fold: whether near duplicates are folded into the best of them.
    """

    index: str
    hits: int
    described: int
    fold: bool
    text: str | None = None
    pixels_3SS: Tensor | None = None
    vector_D: Float32 | None = None
    row: int | None = None


class Bodies:
    """Reads bodies of at most `largest` bytes."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytes]:
        """The body, which counts as held until the context is left.

        Raises:
            RefusedError: too large, too slow, or too many at once.
        """
        body, told = bytearray(), request.headers.get("content-length", "0")
        try:
            if int(told) > self.largest:
                raise self._too_large()
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for chunk in request.stream():
                        body += chunk
                        self._held += len(chunk)
                        if len(body) > self.largest:
                            raise self._too_large()
                        if self._held > ALL_BODIES * self.largest:
                            raise busy()
            except TimeoutError:
                message = f"the body did not arrive in {BODY_SECONDS:g} seconds"
                raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, message) from None
            yield bytes(body)
        finally:
            self._held -= len(body)

    def _too_large(self) -> RefusedError:
        message = f"a body of more than {self.largest:,} bytes; send a smaller picture"
        return RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


def busy() -> RefusedError:
    """The refusal of one request too many."""
    return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once; try again soon")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RefusedError: anything else.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is no JSON ({str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise bad('the body is no JSON object, like {"text": "a cat"}')
    return cast(dict[str, Any], found)


def parse_question(
    found: Mapping[str, Any], index: str, count: int, dim: int, preprocess: Preprocess
) -> Question:
    """clip-retrieval's fields, to an index of `count` vectors of `dim` numbers.

    "id", a row to search by, is a field of ours.

    Raises:
        RefusedError: a field that is missing, wrong, or asks for what is not here.
    """
    if found.get("modality", "image") != "image":
        raise bad('modality: this index finds images; give "image"')
    if found.get("use_mclip"):
        raise bad("use_mclip: an index is asked with its own model; leave it out")
    if found.get("image_url"):
        raise bad("image_url: this server fetches no addresses; send the bytes in base64 as image")
    kinds = ("text", "image", "embedding_input", "id")
    given = [name for name in kinds if found.get(name) is not None]
    if len(given) != 1:
        raise bad(f"give one of {', '.join(kinds)}; found {' and '.join(given) or 'none'}")
    (kind,) = given
    described = _number(found, "num_images", 1, MAX_HITS, default=40)
    return Question(
        index=index,
        hits=_number(found, "num_result_ids", 1, MAX_HITS, default=described),
        described=described,
        fold=bool(found.get("deduplicate")),
        text=_text(found[kind]) if kind == "text" else None,
        pixels_3SS=_pixels(found[kind], preprocess) if kind == "image" else None,
        vector_D=_vector(found[kind], dim) if kind == "embedding_input" else None,
        row=_number(found, "id", 0, count - 1) if kind == "id" else None,
    )


def parse_rows(found: Mapping[str, Any], count: int) -> list[int]:
    """The "ids" of a request for metadata.

    Raises:
        RefusedError: no list of rows of an index of `count`.
    """
    ids: Any = found.get("ids")
    if not isinstance(ids, list) or len(cast(list[Any], ids)) > MAX_HITS:
        raise bad(f"ids: expected a list of at most {MAX_HITS} numbers")
    return [_number({"ids": row}, "ids", 0, count - 1) for row in cast(list[Any], ids)]


def bad(message: str) -> RefusedError:
    """The refusal of a request that makes no sense."""
    return RefusedError(HTTPStatus.BAD_REQUEST, message)


def _number(
    found: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None
) -> int:
    value = found.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise bad(f"{name}: {str(value)[:40]!r}; expected a whole number from {low} to {high}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise bad(f"text: expected 1 to {MAX_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        raise bad("text: expected whole Unicode characters") from None
    return value


def _vector(value: Any, dim: int) -> Float32:
    try:
        vector_D = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        vector_D = np.empty(0, np.float32)
    if vector_D.shape != (dim,) or not np.isfinite(vector_D).all() or not vector_D.any():
        raise bad(f"embedding_input: expected a list of {dim} finite numbers, not all zero")
    return unit_rows(vector_D)


def _pixels(value: Any, preprocess: Preprocess) -> Tensor:
    try:
        data = base64.b64decode(value, validate=True)
    except (ValueError, TypeError):
        raise bad("image: expected the bytes of a picture in base64") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own remark about many pixels
            width, height = Image.open(io.BytesIO(data)).size  # of the header, nothing is decoded
        pixels = width * height
    except Image.DecompressionBombError:  # PIL's own limit is higher
        pixels = MAX_PIXELS + 1
    except (OSError, SyntaxError, ValueError):
        pixels = 0  # `eval` says what is wrong, in its own words
    if pixels > MAX_PIXELS:
        message = f"image: more than {MAX_PIXELS:,} pixels; send a smaller one"
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
    try:
        return preprocess.eval(data)
    except ImageError as error:
        raise bad(f"image: {error}") from None
