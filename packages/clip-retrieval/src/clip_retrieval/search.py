"""An index directory, opened: nearest pictures by text or image, with exact similarities."""

# N rows, Q queries, D embedding width, K hits

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clip_models import LoadedModel, ModelError, load_model

from clip_retrieval import index as faiss_index
from clip_retrieval.embed import embed_image, embed_texts, pick_device
from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import read_facts
from clip_retrieval.metadata import Metadata
from clip_retrieval.shards import read_span
from clip_retrieval.vectors import Float16, Float32, open_vectors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """A question: a text, or an encoded image and the name it is shown under."""

    text: str | None = None
    image: bytes | None = None
    name: str = ""

    def to_dict(self) -> dict[str, str]:
        """{"text": …} or {"image": name}."""
        return {"image": self.name} if self.text is None else {"text": self.text}


@dataclass(frozen=True)
class Hit:
    """One picture found; rank from 1, similarity the exact cosine."""

    rank: int
    row: int
    key: str
    caption: str | None
    similarity: float
    shard: str
    json: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dict(vars(self))


@dataclass(frozen=True)
class Answer:
    """A query and its hits, best first."""

    query: Query
    hits: list[Hit]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"query": self.query.to_dict(), "hits": [hit.to_dict() for hit in self.hits]}


class Index:
    """A whole index directory, memory-mapped but for the FAISS index itself.

    Attributes:
        facts: index.json.

    Raises:
        RetrievalError: no index is there, or its files are truncated or do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = read_facts(path)
        self._faiss = faiss_index.read_index(path / "image.index")
        self._vectors_ND: Float16 = open_vectors(path / "embeddings.npy")
        self._metadata = Metadata(path / "metadata.arrow")
        rows = (self._faiss.ntotal, len(self._vectors_ND), len(self._metadata))
        widths = (self._faiss.d, self._vectors_ND.shape[1])
        if set(rows) != {self.facts["images"]} or set(widths) != {self.facts["dim"]}:
            raise RetrievalError(
                f"{path}: its files do not agree (rows {rows}, expected {self.facts['images']}; "
                f"width {widths}, expected {self.facts['dim']}); build it again"
            )
        self._knob = faiss_index.Knob(**self.facts["search"])

    def __len__(self) -> int:
        return self.facts["images"]

    def load_model(self, path: Path | None = None, device: str = "auto") -> LoadedModel:
        """Load the recorded model, or the same one from another place.

        Raises:
            RetrievalError: it is gone, or its weights or preprocessing are not the index's.
        """
        if path is None and not (path := Path(self.facts["model"])).is_dir():
            raise RetrievalError(f"{path}, the model of {self.path}, is gone; give --model DIR")
        loaded = load_model(path, pick_device(device))
        found = {"fingerprint": loaded.fingerprint, "preprocess": loaded.preprocess.hash}
        for name, value in found.items():
            if value != (expected := self.facts["inputs"][name]):
                raise RetrievalError(
                    f"{path} is not the model of {self.path}: {name} {value[:20]}…, expected "
                    f"{expected[:20]}…; give the one it was built with ({self.facts['model']})"
                )
        return loaded

    def nearest(self, queries_QD: Float32, k: int) -> list[list[Hit]]:
        """The k nearest pictures to each unit row; all of them where k is above the count.

        Raises:
            RetrievalError: queries of another width.
        """
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.facts["dim"]:
            raise RetrievalError(
                f"queries of shape {queries_QD.shape}; {self.path} holds vectors of "
                f"{self.facts['dim']} numbers"
            )
        if k > len(self):
            log.warning("-k %d is above the %d images of the index: all are shown", k, len(self))
        rows_QK, scores_QK = faiss_index.search(
            self._faiss, self._vectors_ND, queries_QD, min(k, len(self)), self._knob
        )
        return [
            [
                self._hit(rank, int(row), float(score))
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
                if row >= 0
            ]
            for rows, scores in zip(rows_QK, scores_QK, strict=True)
        ]

    def image(self, row: int) -> bytes:
        """The encoded picture of a row, read from its shard.

        Raises:
            RetrievalError: the shard is gone or is another one.
        """
        values = self._metadata[row]
        shard = Path(self.facts["shards"]) / values["shard"]
        if not shard.is_file():
            raise RetrievalError(f"{shard} is gone; pictures are read from the shards indexed")
        if shard.stat().st_size != self.facts["inputs"]["shard_bytes"][shard.name]:
            raise RetrievalError(f"{shard} has changed since {self.path} was built; build it again")
        with shard.open("rb") as file:
            return read_span(file, (values["offset"], values["size"]))

    def _hit(self, rank: int, row: int, similarity: float) -> Hit:
        values = self._metadata[row]
        return Hit(
            rank=rank,
            row=row,
            key=values["key"],
            caption=values["caption"],
            similarity=round(similarity, 6),
            shard=values["shard"],
            json=values["json"],
        )


def query_index(
    index: Index,
    queries: list[Query],
    *,
    k: int = 10,
    model: Path | None = None,
    device: str = "auto",
) -> list[Answer]:
    """Answer all queries, in their order.

    Raises:
        RetrievalError: another model than the index's, an image that is not one.
    """
    loaded = index.load_model(model, device)
    rows = list[Float32]()
    for query in queries:
        if query.image is None:
            rows.append(embed_texts(loaded, [query.text or ""]))
            continue
        try:
            rows.append(embed_image(loaded, query.image))
        except ModelError as error:
            raise RetrievalError(f"image {query.name}: {error}") from error
    found = index.nearest(np.concatenate(rows), k)
    return [Answer(query, hits) for query, hits in zip(queries, found, strict=True)]
