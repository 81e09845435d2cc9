"""A folder of embeddings, as clip-retrieval lays it out.

OUT/img_emb/img_emb_N.npy         float16 unit rows of pictures, N the part's number, 0 in front
OUT/text_emb/text_emb_N.npy       of their captions, a row per row
OUT/metadata/metadata_N.parquet   image_path, caption, url and what else is known, a row per row
OUT/embeddings.json               ours: the model's fingerprint, and the parts there are to be

A part's metadata is written last, so that a part with metadata is whole. Folders that
clip-retrieval made have no embeddings.json, and are read like ours.
"""

# N rows, D embedding width

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clip_retrieval.errors import RetrievalError
from clip_retrieval.metadata import COLUMNS
from clip_retrieval.vectors import Float16, check_unit

FACTS = "embeddings.json"


@dataclass(frozen=True)
class Chunk:
    """Some rows on their way into an index.

    Attributes:
        rows_ND: float16 unit rows.
        table: of metadata.COLUMNS.
        texts_ND: text queries and
        text_rows: the rows, within the chunk, that each is the caption of.
    """

    rows_ND: Float16
    table: Any
    texts_ND: Float16
    text_rows: NDArray[np.int64]


class Embeddings:
    """A folder of embeddings.

    Attributes:
        facts: embeddings.json; empty where clip-retrieval made the folder.
        kind: "img_emb", or "text_emb" where there are captions only.

    Raises:
        RetrievalError: no such folder, a part that is missing, files that do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        if (path / FACTS).is_file():
            self.facts = json.loads((path / FACTS).read_bytes())
        self._files = {kind: _numbered(path / kind, ".npy") for kind in ("img_emb", "text_emb")} | {
            "metadata": _numbered(path / "metadata", ".parquet")
        }
        self.kind = "img_emb" if self._files["img_emb"] else "text_emb"
        if not self._files[self.kind]:
            raise RetrievalError(f"{path} holds no embeddings; `clip-retrieval embed` makes them")
        wanted = set(range(len(self.facts.get("parts") or self._files[self.kind])))
        needed = {"metadata"} if self.facts else set[str]()
        for kind in sorted({self.kind} | needed | {k for k, f in self._files.items() if f}):
            if lost := sorted(wanted ^ set(self._files[kind])):
                raise RetrievalError(
                    f"{path / kind}: part {lost[0]} is missing, expected parts 0 to "
                    f"{len(wanted) - 1}; make it again (`clip-retrieval embed` continues)"
                )
        self.count = sum(len(self._load(self.kind, n)) for n in self.numbers)
        if not self.count:
            raise RetrievalError(f"{path} holds no rows; nothing could be embedded")

    @property
    def numbers(self) -> list[int]:
        """The parts' numbers, in order."""
        return sorted(self._files[self.kind])

    @cached_property
    def dim(self) -> int:
        """The embedding width."""
        return self._load(self.kind, self.numbers[0]).shape[1]

    @property
    def failed(self) -> int:
        """Pictures that could not be read when they were embedded."""
        found = 0
        for file in self._files["metadata"].values():
            try:
                found += int((pq.read_schema(file).metadata or {}).get(b"failed", 0))
            except (pa.ArrowInvalid, OSError) as error:
                raise RetrievalError(f"{file} cannot be read ({error}); make it again") from error
        return found

    def parts(self) -> list[dict[str, Any]]:
        """What tells each part from parts of other sources, and its rows."""
        found: list[dict[str, Any]] = []
        for number in self.numbers:
            file = self._files[self.kind][number]
            own: dict[str, Any] = {"source": str(self.path.resolve()), "name": file.name}
            own["bytes"] = file.stat().st_size
            told = self.facts["parts"][number] if self.facts else own
            found.append(told | {"rows": len(self._load(self.kind, number))})
        return found

    def chunks(self, wanted: set[int] | None = None) -> Iterator[Chunk]:
        """The parts one by one, checked; those numbered, if any are.

        Raises:
            RetrievalError: rows that are not of one length, not normalised or not finite.
        """
        for number in self.numbers if wanted is None else sorted(wanted):
            rows_ND = self._part(self.kind, number)
            count = len(rows_ND)
            table = self._table(number, count)
            has_text = bool(self._files["text_emb"])
            texts_ND = self._part("text_emb", number) if has_text else rows_ND[:0]
            if has_text and len(texts_ND) != count:
                raise RetrievalError(
                    f"{self._files['text_emb'][number]}: {len(texts_ND)} rows beside {count} "
                    "pictures; embed them again"
                )
            # ours stand beside rows without a caption as well, clip-retrieval's are all captions
            said = table["caption"].is_valid().to_numpy() if self.facts else np.ones(count, bool)
            text_rows = np.flatnonzero(said) if has_text else np.zeros(0, np.int64)
            yield Chunk(rows_ND, table, texts_ND[text_rows], text_rows)

    def _part(self, kind: str, number: int) -> Float16:
        rows_ND = self._load(kind, number)
        where = str(self._files[kind][number])
        if rows_ND.shape[1] != self.dim:
            raise RetrievalError(f"{where}: width {rows_ND.shape[1]}, expected {self.dim}")
        check_unit(rows_ND, where)
        return rows_ND.astype(np.float16, copy=False)

    def _load(self, kind: str, number: int) -> NDArray[Any]:
        file = self._files[kind][number]
        try:
            rows_ND = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise RetrievalError(f"{file} cannot be read ({error}); make it again") from error
        if rows_ND.ndim != 2 or rows_ND.dtype not in (np.float16, np.float32):
            raise RetrievalError(
                f"{file} holds {rows_ND.dtype} {rows_ND.shape}; expected float16 [rows, width]"
            )
        return rows_ND

    def _table(self, number: int, count: int) -> Any:
        """A part's metadata as COLUMNS; clip-retrieval's other columns become the json."""
        if number not in self._files["metadata"]:
            keys = [f"{number:05d}{row:04d}" for row in range(count)]
            return pa.Table.from_pylist([{"key": key} for key in keys], schema=COLUMNS)
        file = self._files["metadata"][number]
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise RetrievalError(f"{file} cannot be read ({error}); make it again") from error
        if table.num_rows != count:
            raise RetrievalError(f"{file}: {table.num_rows} rows beside {count} embeddings")
        if self.facts:
            names = ["key" if name == "image_path" else name for name in table.schema.names]
            return table.rename_columns(names)
        rows = [_as_ours(row, number, n) for n, row in enumerate(table.to_pylist())]
        return pa.Table.from_pylist(rows, schema=COLUMNS)


def _as_ours(row: dict[str, Any], number: int, n: int) -> dict[str, Any]:
    caption, url = row.pop("caption", None), row.pop("url", None)
    key = row.pop("key", None) or row.get("image_path") or f"{number:05d}{n:04d}"
    return {
        "key": str(key),
        "caption": str(caption) if caption is not None else None,
        "url": str(url) if url is not None else None,
        "json": json.dumps(row, default=str) if row else None,
    }


def is_embeddings(path: Path) -> bool:
    """Whether a folder holds embeddings, not pictures or shards."""
    return any((path / name).exists() for name in ("img_emb", "text_emb", FACTS))


def write_part(
    out: Path, number: int, parts: int, arrays: dict[str, NDArray[Any]], table: Any
) -> None:
    """Write one part; its metadata last, whole or not at all."""
    stem = str(number).zfill(len(str(parts)))  # as clip-retrieval pads them
    for kind, rows_ND in arrays.items():
        buffer = BytesIO()
        np.save(buffer, rows_ND.astype(np.float16))
        _write(out / kind / f"{kind}_{stem}.npy", buffer.getvalue())
    buffer = BytesIO()
    renamed = table.rename_columns(["image_path", *COLUMNS.names[1:]])
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), buffer)
    _write(out / "metadata" / f"metadata_{stem}.parquet", buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def parts_done(out: Path) -> set[int]:
    """The numbers of the parts that are whole."""
    return set(_numbered(out / "metadata", ".parquet"))


def forget_part(out: Path, number: int) -> None:
    """Make a part one that is missing."""
    for part, file in _numbered(out / "metadata", ".parquet").items():
        if part == number:
            file.unlink()


def _numbered(directory: Path, suffix: str) -> dict[int, Path]:
    """{N: file} of the files named `…_N` and the suffix."""
    found = ((re.search(r"_(\d+)$", file.stem), file) for file in directory.glob(f"*{suffix}"))
    return {int(match[1]): file for match, file in found if match}
