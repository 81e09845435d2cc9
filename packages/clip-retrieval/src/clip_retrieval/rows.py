"""Rows on their way into a generation: from a folder of embeddings or from another generation."""

# N rows, D embedding width, H held-out rows

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_retrieval.embeddings import Chunk, Embeddings
from clip_retrieval.layout import generation
from clip_retrieval.metadata import Metadata, MetadataWriter
from clip_retrieval.vectors import Float16, Int64, Rows, RowWriter

HELD_OUT = 1_000  # queries of each kind, at most a tenth of the rows
_AT_A_TIME = 1 << 16  # rows copied from a generation


@dataclass(frozen=True)
class HeldOut:
    """Rows kept out while the search is tuned, and text queries.

    Attributes:
        rows_H: row numbers, ascending.
        texts_ND: float16 unit rows.
        text_rows: the row that each is the caption of.
    """

    rows_H: Int64
    texts_ND: Float16
    text_rows: Int64

    def save(self, path: Path) -> None:
        """Write `held_out.npz`."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "HeldOut":
        """Read `held_out.npz`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in ("rows_H", "texts_ND", "text_rows")})


class FromEmbeddings:
    """The rows of a folder of embeddings, or of some of its parts."""

    def __init__(self, embeddings: Embeddings, numbers: set[int] | None = None) -> None:
        self._embeddings, self._numbers = embeddings, numbers
        parts = embeddings.parts()
        chosen = range(len(parts)) if numbers is None else sorted(numbers)
        self.parts = [parts[number] for number in chosen]
        self.count = sum(part["rows"] for part in self.parts)

    def chunks(self) -> Iterator[tuple[Chunk, Int64 | None]]:
        """Each chunk; None, as no row has been held out before."""
        for chunk in self._embeddings.chunks(self._numbers):
            yield chunk, None


class FromIndex:
    """The rows of an index, or those of them that are kept."""

    def __init__(self, path: Path, facts: dict[str, Any], keep_N: NDArray[Any] | None = None):
        files = generation(path, facts)
        self._rows, self._metadata = Rows(files / "rows.index"), Metadata(files / "metadata.arrow")
        self._held = HeldOut.load(files / "held_out.npz")
        self._keep_N = np.ones(len(self._rows), bool) if keep_N is None else keep_N
        ends = np.cumsum([part["rows"] for part in facts["parts"]])[:-1]
        kept = [int(k.sum()) for k in np.split(self._keep_N, ends)]
        self.parts = [
            part | {"rows": rows} for part, rows in zip(facts["parts"], kept, strict=True)
        ]
        self.count = int(self._keep_N.sum())

    def chunks(self) -> Iterator[tuple[Chunk, Int64 | None]]:
        """Each chunk, and the rows of it that were held out when the index was built."""
        for start in range(0, len(self._rows), _AT_A_TIME):
            keep = self._keep_N[start : start + _AT_A_TIME]
            new_row = np.cumsum(keep) - 1

            def kept(rows: Int64, start: int = start, keep: NDArray[Any] = keep) -> NDArray[Any]:
                inside = (rows >= start) & (rows < start + len(keep))
                inside[inside] = keep[rows[inside] - start]
                return inside

            is_held, has_text = kept(self._held.rows_H), kept(self._held.text_rows)
            table = self._metadata.table.slice(start, len(keep)).filter(keep)
            chunk = Chunk(
                self._rows.stored_ND[start : start + len(keep)][keep],
                table,
                self._held.texts_ND[has_text],
                new_row[self._held.text_rows[has_text] - start],
            )
            yield chunk, new_row[self._held.rows_H[is_held] - start]


RowSource = FromEmbeddings | FromIndex


def write_rows(files: Path, sources: Sequence[RowSource], dim: int) -> HeldOut:
    """Write rows.index and metadata.arrow; what to hold out of the index.

    That is a random sample of rows that come for the first time, and what was held out before.
    """
    count = sum(source.count for source in sources)
    sample = np.zeros(count, bool)
    sample[np.random.default_rng(0).permutation(count)[: min(HELD_OUT, count // 10)]] = True
    held, texts, text_rows = list[Int64](), list[Float16](), list[Int64]()
    rows, metadata = (
        RowWriter(files / "rows.index", count, dim),
        MetadataWriter(files / "metadata.arrow"),
    )
    start = 0
    for source in sources:
        for chunk, before in source.chunks():
            rows.write(chunk.rows_ND)
            metadata.write(chunk.table)
            chosen = before
            if chosen is None:
                chosen = np.flatnonzero(sample[start : start + len(chunk.rows_ND)])
            asked = np.isin(chunk.text_rows, chosen)
            held.append(start + chosen)
            texts.append(chunk.texts_ND[asked])
            text_rows.append(start + chunk.text_rows[asked])
            start += len(chunk.rows_ND)
    rows.close()
    metadata.close()
    found = HeldOut(np.concatenate(held), np.concatenate(texts), np.concatenate(text_rows))
    step = max(1, -(-len(found.rows_H) // HELD_OUT))
    kept = found.rows_H[::step]
    asked = np.isin(found.text_rows, kept)
    return HeldOut(kept, found.texts_ND[asked], found.text_rows[asked])
