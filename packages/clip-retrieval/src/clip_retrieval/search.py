"""An index directory, opened: nearest pictures by text or image, with exact similarities."""

# N rows, Q queries, D embedding width, K hits

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from clip_models import LoadedModel, load_model

from clip_retrieval import index as faiss_index
from clip_retrieval.embed import pick_device
from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import generation, read_facts
from clip_retrieval.metadata import Metadata
from clip_retrieval.vectors import Float32, Int64, Rows

log = logging.getLogger(__name__)

_LOOKED_AT = 10_000  # matches, or ten times those asked for, among which duplicates are folded
_LISTED = 1_000  # duplicates of a match


@dataclass(frozen=True)
class Match:
    """A row found: its exact cosine similarity, and the rows folded into it, the first 1,000."""

    row: int
    similarity: float
    duplicates: tuple[int, ...] = ()


@dataclass(frozen=True)
class Hit:
    """A match with what is known of the picture; rank from 1."""

    rank: int
    row: int
    key: str
    caption: str | None
    similarity: float
    url: str | None
    shard: str | None
    json: Any
    duplicates: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; without duplicates where there are none."""
        values = dict(vars(self))
        return values if self.duplicates else {k: values[k] for k in values if k != "duplicates"}


class Index:
    """A whole index directory, memory-mapped but for the FAISS index itself.

    It is never changed, so threads may share it. A change to the directory leaves it as it is:
    its files stay mapped.

    Attributes:
        path: the directory.
        facts: index.json.
        rows: the float16 rows.
        metadata: what is known of each.
        searcher: the FAISS index over the rows, searched as wide as
        knob: says.

    Raises:
        RetrievalError: no index is there, or its files are truncated or do not agree.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self.facts = read_facts(path)
        while True:
            try:
                self._open(generation(path, self.facts), device)
                return
            except (RetrievalError, FileNotFoundError):
                before, self.facts = self.facts, read_facts(path)
                if before["generation"] == self.facts["generation"]:  # not replaced meanwhile
                    raise

    def _open(self, files: Path, device: str) -> None:
        index = faiss_index.read_index(files / "image.index")
        self.rows = Rows(files / "rows.index")
        self.metadata = Metadata(files / "metadata.arrow")
        rows = (index.ntotal, len(self.rows), len(self.metadata))
        widths = (index.d, self.rows.flat.d)
        if set(rows) != {self.facts["images"]} or set(widths) != {self.facts["dim"]}:
            raise RetrievalError(
                f"{self.path}: its files do not agree (rows {rows}, expected "
                f"{self.facts['images']}; width {widths}, expected {self.facts['dim']}); build it "
                "again"
            )
        if pick_device(device).type == "cuda":
            index = faiss_index.to_gpu(index, self.facts["plan"]["family"])
        self.searcher = faiss_index.Searcher(index, self.rows)
        self.knob = faiss_index.Knob(**self.facts["search"])

    def __len__(self) -> int:
        return self.facts["images"]

    def load_model(self, path: Path | None = None, device: str = "auto") -> LoadedModel:
        """Load the recorded model, or the same one from another place.

        Raises:
            RetrievalError: it is gone, or its weights or preprocessing are not the index's.
        """
        recorded = self.facts["model"]
        if path is None:
            if recorded is None:
                raise RetrievalError(f"{self.path} knows no model; give --model DIR")
            if not (path := Path(recorded)).is_dir():
                raise RetrievalError(f"{path}, the model of {self.path}, is gone; give --model DIR")
        loaded = load_model(path, pick_device(device))
        found = {"fingerprint": loaded.fingerprint, "preprocess": loaded.preprocess.hash}
        for name, value in found.items():
            expected = self.facts["inputs"][name]
            if expected is not None and value != expected:
                raise RetrievalError(
                    f"{path} is not the model of {self.path}: {name} {value[:20]}…, expected "
                    f"{expected[:20]}…; give the one it was built with ({recorded})"
                )
        if loaded.config.embed_dim != self.facts["dim"]:
            raise RetrievalError(
                f"{path} makes {loaded.config.embed_dim} numbers, {self.path} holds vectors of "
                f"{self.facts['dim']}; give the model it was made with"
            )
        return loaded

    def search(
        self,
        queries_QD: Float32,
        k: int,
        *,
        threshold: float | None = None,
        where: str | None = None,
        fold: float | None = None,
    ) -> list[list[Match]]:
        """The k nearest pictures to each unit row, best first; fewer where there are not as many.

        Args:
            threshold: the least cosine similarity.
            where: a filter (Metadata.matching); the rows it lets through are all compared.
            fold: the similarity from which a match is a duplicate of a better one. k matches that
                are no duplicates are looked for, among the nearest 10,000 or 10 k.

        Raises:
            RetrievalError: queries of another width, a filter that cannot be read.
        """
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.facts["dim"]:
            raise RetrievalError(
                f"queries of shape {queries_QD.shape}; {self.path} holds vectors of "
                f"{self.facts['dim']} numbers"
            )
        among = None if where is None else self.metadata.matching(where)
        found = self._found(queries_QD, min(k, len(self)), threshold, among)
        if fold is None:
            return found
        return [
            self._fold(query_D[None], k, matches, fold, threshold, among)
            for query_D, matches in zip(queries_QD, found, strict=True)
        ]

    def nearest(self, queries_QD: Float32, k: int, **options: Any) -> list[list[Hit]]:
        """The same as search, with what is known of each picture."""
        if k > len(self):
            log.warning("-k %d is above the %d images of the index: all are shown", k, len(self))
        return [
            [self._hit(rank, match) for rank, match in enumerate(matches, 1)]
            for matches in self.search(queries_QD, k, **options)
        ]

    def _found(
        self, queries_QD: Float32, k: int, threshold: float | None, among: Int64 | None
    ) -> list[list[Match]]:
        if among is not None and not len(among):
            return [[] for _ in queries_QD]
        if among is None:
            rows_QK, scores_QK = self.searcher.search(queries_QD, k, self.knob)
        else:
            rows_QK, scores_QK = self.searcher.search_among(queries_QD, k, among)
        keep_QK = (rows_QK >= 0) & (scores_QK >= (-np.inf if threshold is None else threshold))
        scores_QK = np.round(scores_QK.astype(np.float64), 6)
        return [
            [Match(r, s) for r, s in zip(rows[keep].tolist(), scores[keep].tolist(), strict=True)]
            for rows, scores, keep in zip(rows_QK, scores_QK, keep_QK, strict=True)
        ]

    def _fold(
        self,
        query_1D: Float32,
        k: int,
        matches: list[Match],
        fold: float,
        threshold: float | None,
        among: Int64 | None,
    ) -> list[Match]:
        """k matches that are no duplicates; looks further while there are too few."""
        asked, most = min(k, len(self)), min(max(10 * k, _LOOKED_AT), len(self))
        while True:
            unit_MD = self.rows.unit(np.array([match.row for match in matches], np.int64))
            covered_M = np.zeros(len(matches), bool)
            kept: dict[int, list[int]] = {}  # number of a match -> rows folded into it
            for m in range(len(matches)):
                if not covered_M[m]:
                    kept[m] = []
                    covered_M |= unit_MD @ unit_MD[m] >= fold
            if len(kept) >= k or len(matches) < asked or asked == most:
                break
            asked = min(2 * asked, most)
            matches = self._found(query_1D, asked, threshold, among)[0]
        better_K = np.array(list(kept), np.int64)
        folded_F = np.setdiff1d(np.arange(len(matches)), better_K)
        for start in range(0, len(folded_F), 1024):
            block_B = folded_F[start : start + 1024]
            alike_BK = unit_MD[block_B] @ unit_MD[better_K].T
            alike_BK[better_K > block_B[:, None]] = -np.inf  # into a better hit, the most alike
            for m, nearest in zip(block_B.tolist(), alike_BK.argmax(1).tolist(), strict=True):
                kept[int(better_K[nearest])].append(matches[m].row)
        return [
            Match(matches[m].row, matches[m].similarity, tuple(rows[:_LISTED]))
            for m, rows in list(kept.items())[:k]
        ]

    def row(self, row: int) -> dict[str, Any]:
        """What is known of a row: key, caption, url, json (parsed), shard, offset, size."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.metadata[row]

    def vector(self, row: int) -> Float32:
        """A row as a unit vector."""
        return self.rows.unit(np.array([row]))[0]

    def thumbnail(self, row: int) -> bytes | None:
        """The small JPEG of a row, if the index keeps them."""
        return self.metadata.thumbnail(row)

    def image(self, row: int) -> bytes:
        """The encoded picture of a row, from its shard or folder, or else its thumbnail.

        Raises:
            RetrievalError: neither is there, or the shard is another one.
        """
        values = self.metadata[row]
        kept = self.thumbnail(row)
        if values["shard"] is None or not values["size"]:
            if kept is None:
                raise RetrievalError(f"{self.path}: no picture is known of {values['key']}")
            return kept
        part = self.facts["parts"][int(np.searchsorted(self._part_ends, row, "right"))]
        file = Path(part["source"]) / values["shard"]
        if not file.is_file():
            if kept is None:
                raise RetrievalError(f"{file} is gone; pictures are read from the shards indexed")
            return kept
        expected = part["bytes"] if part["name"] == values["shard"] else values["size"]
        if file.stat().st_size != expected:
            raise RetrievalError(f"{file} has changed since {self.path} was built; build it again")
        with file.open("rb") as opened:
            opened.seek(values["offset"])
            return opened.read(values["size"])

    @cached_property
    def _part_ends(self) -> Int64:
        return np.cumsum([part["rows"] for part in self.facts["parts"]])

    def _hit(self, rank: int, match: Match) -> Hit:
        values = self.metadata[match.row]
        return Hit(
            rank=rank,
            row=match.row,
            key=values["key"],
            caption=values["caption"],
            similarity=match.similarity,
            url=values["url"],
            shard=values["shard"],
            json=values["json"],
            duplicates=match.duplicates,
        )
