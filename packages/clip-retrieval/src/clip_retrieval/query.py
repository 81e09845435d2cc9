"""Questions to an index: texts, pictures, embeddings, and sums of them."""

# D embedding width

import http.client
import io
import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from clip_models import LoadedModel, ModelError

from clip_retrieval.embed import embed_image, embed_texts
from clip_retrieval.errors import RetrievalError
from clip_retrieval.search import Hit, Index
from clip_retrieval.vectors import Float32, unit_rows

_MAX_IMAGE = 64 << 20  # bytes taken from a URL
_SECONDS = 10  # to wait for it


@dataclass(frozen=True)
class Query:
    """A question: a text, an encoded image, or an embedding, and the name it is shown under.

    Attributes:
        weight: of a term in a sum; below zero it is taken away.
    """

    text: str | None = None
    image: bytes | None = None
    embedding: Float32 | None = None
    name: str = ""
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """{"text": …}, {"image": name} or {"embedding": name}, and the weight if it is not 1."""
        kind = "image" if self.image is not None else "embedding"
        shown: dict[str, Any] = {kind: self.name} if self.text is None else {"text": self.text}
        return shown if self.weight == 1 else shown | {"weight": self.weight}


@dataclass(frozen=True)
class Answer:
    """A query, or the terms of a combination, and the hits, best first."""

    terms: tuple[Query, ...]
    hits: list[Hit]

    @property
    def query(self) -> Query:
        """The first term."""
        return self.terms[0]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        terms = [term.to_dict() for term in self.terms]
        asked = terms[0] if len(terms) == 1 else {"combined": terms}
        return {"query": asked, "hits": [hit.to_dict() for hit in self.hits]}


def to_json(value: Any) -> bytes:
    """JSON that every reader takes, of what a shard's .json may hold.

    NaN becomes null, and half of a surrogate pair the escape that JSON has for it.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
        text = json.dumps(plain, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


def query_index(
    index: Index,
    queries: Sequence[Query | Sequence[Query]],
    *,
    k: int = 10,
    model: Path | None = None,
    device: str = "auto",
    **options: Any,
) -> list[Answer]:
    """Answer all queries, in their order; a sequence of them is added up into one.

    Args:
        options: threshold, where, fold (Index.search).

    Raises:
        RetrievalError: another model than the index's, an image that is not one, an embedding of
            another width, terms that cancel out.
    """
    groups = [(q,) if isinstance(q, Query) else tuple(q) for q in queries]
    needs_model = any(term.embedding is None for terms in groups for term in terms)
    loaded = index.load_model(model, device) if needs_model else None
    rows = [_combined(index, loaded, terms) for terms in groups]
    found = index.nearest(np.stack(rows), k, **options)
    return [Answer(terms, hits) for terms, hits in zip(groups, found, strict=True)]


def _combined(index: Index, loaded: LoadedModel | None, terms: tuple[Query, ...]) -> Float32:
    total_D = np.zeros(index.facts["dim"], np.float32)
    for term in terms:
        total_D += np.float32(term.weight) * _embed(index, loaded, term)
    if not np.linalg.norm(total_D) > 1e-6:
        names = ", ".join(str(term.to_dict()) for term in terms)
        raise RetrievalError(f"{names}: the terms cancel each other; there is nothing to look for")
    return unit_rows(total_D)


def _embed(index: Index, loaded: LoadedModel | None, term: Query) -> Float32:
    if term.embedding is not None:
        row_D = np.asarray(term.embedding, np.float32)
        if row_D.shape != (index.facts["dim"],):
            raise RetrievalError(
                f"embedding {term.name} has the shape {list(row_D.shape)}; {index.path} holds "
                f"vectors of {index.facts['dim']} numbers"
            )
        if not np.isfinite(row_D).all() or not row_D.any():
            raise RetrievalError(f"embedding {term.name} is zero or not finite")
        return unit_rows(row_D)
    if loaded is None:
        raise RetrievalError("a text or an image takes the model")
    if term.image is None:
        return embed_texts(loaded, [term.text or ""])[0]
    try:
        return embed_image(loaded, term.image)[0]
    except ModelError as error:
        raise RetrievalError(f"image {term.name}: {error}") from error


def minus(query: Query) -> Query:
    """The query with its weight below zero."""
    return replace(query, weight=-query.weight)


def read_embeddings(data: bytes, name: str) -> list[Query]:
    """A .npy file of one row or several, or JSON lists of numbers, one on a line.

    Raises:
        RetrievalError: it is neither.
    """
    try:
        if data.startswith(b"\x93NUMPY"):
            rows = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
        else:
            rows = np.array([json.loads(line) for line in data.splitlines() if line.strip()])
            rows = rows.astype(np.float32)
        rows_QD = np.atleast_2d(rows)
        if rows_QD.ndim != 2 or not rows_QD.size:
            raise ValueError(f"its shape is {list(rows.shape)}")
    except (ValueError, TypeError, EOFError) as error:
        raise RetrievalError(
            f"{name} holds no embeddings ({error}); expected a .npy file, or JSON lists of numbers"
        ) from error
    if len(rows_QD) == 1:
        return [Query(embedding=rows_QD[0], name=name)]
    return [Query(embedding=row, name=f"{name}[{n}]") for n, row in enumerate(rows_QD)]


def fetch_image(url: str) -> bytes:
    """The bytes behind an http:// URL on this machine; nothing further away is asked.

    Raises:
        RetrievalError: another host, no answer, or too large a one.
    """
    try:
        parts = urlsplit(url)
        addresses = {i[4][0] for i in socket.getaddrinfo(parts.hostname or "", parts.port or 80)}
    except (OSError, ValueError) as error:
        raise RetrievalError(f"{url}: {error}") from error
    if parts.scheme != "http" or not all(ipaddress.ip_address(a).is_loopback for a in addresses):
        raise RetrievalError(
            f"{url} is not on this machine; only http://localhost is fetched, save others first"
        )
    # to the address that was checked, not to what the name means a moment later
    connection = http.client.HTTPConnection(str(min(addresses)), parts.port, timeout=_SECONDS)
    try:
        target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        target = quote(target, safe="/?%!$&'()*+,;=:@~")  # what is quoted stays as it is
        connection.request("GET", target, headers={"Host": parts.netloc})
        answer = connection.getresponse()
        data = answer.read(_MAX_IMAGE + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RetrievalError(f"{url}: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise RetrievalError(f"{url}: HTTP status {answer.status}, expected 200")
    if len(data) > _MAX_IMAGE:
        raise RetrievalError(f"{url}: more than {_MAX_IMAGE >> 20} MB, which is too large")
    return data
