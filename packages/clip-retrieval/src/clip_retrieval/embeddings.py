"""A folder of embeddings, as clip-retrieval lays it out.

OUT/img_emb/img_emb_N.npy         float16 unit rows of pictures, N the part's number, 0 in front
OUT/text_emb/text_emb_N.npy       of their captions, a row per row
OUT/metadata/metadata_N.parquet   image_path, caption, url and what else is known, a row per row
OUT/embeddings.json               ours: the model's fingerprint, and the parts there are to be

A part's metadata is written last and names its arrays: with these a part is whole. Folders that
clip-retrieval made have no embeddings.json, and are read like ours.
"""

# N rows, D embedding width

import json
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
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
from clip_retrieval.vectors import BLOCK_ROWS, Float16, check_unit

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
        self.facts = read_facts(path) if (path / FACTS).is_file() else {}
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

    def failed(self, wanted: set[int] | None = None) -> int:
        """Pictures, of the parts wanted or of all, that could not be read to be embedded."""
        found = 0
        for number, file in self._files["metadata"].items():
            if wanted is None or number in wanted:
                with _readable(file):
                    found += int((pq.read_schema(file).metadata or {}).get(b"failed", 0))
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
        """The parts in blocks of rows, checked; those numbered, if any are.

        Raises:
            RetrievalError: rows that are not of one length, not normalised or not finite.
        """
        for number in self.numbers if wanted is None else sorted(wanted):
            count = len(self._load(self.kind, number))
            has_text = bool(self._files["text_emb"])
            start = 0
            for table in self._tables(number, count):
                rows_ND = self._block(self.kind, number, start, len(table))
                if has_text and (texts := len(self._load("text_emb", number))) != count:
                    raise RetrievalError(
                        f"{self._files['text_emb'][number]}: {texts} rows beside {count} "
                        "pictures; embed them again"
                    )
                # ours stand beside rows without caption as well, clip-retrieval's are all captions
                said = np.full(len(table), has_text)
                if has_text and self.facts:
                    said = table["caption"].is_valid().to_numpy()
                texts_ND = rows_ND
                if has_text:
                    texts_ND = self._block("text_emb", number, start, len(table))
                yield Chunk(rows_ND, table, texts_ND[said], np.flatnonzero(said))
                start += len(table)

    def _block(self, kind: str, number: int, start: int, count: int) -> Float16:
        part_ND = self._load(kind, number)
        where = str(self._files[kind][number])
        if part_ND.shape[1] != self.dim:
            raise RetrievalError(f"{where}: width {part_ND.shape[1]}, expected {self.dim}")
        rows_ND = part_ND[start : start + count]
        check_unit(rows_ND, where, first=start)
        return rows_ND.astype(np.float16, copy=False)

    def _load(self, kind: str, number: int) -> NDArray[Any]:
        file = self._files[kind][number]
        with _readable(file):
            rows_ND = np.load(file, mmap_mode="r", allow_pickle=False)
        if rows_ND.ndim != 2 or rows_ND.dtype not in (np.float16, np.float32):
            raise RetrievalError(
                f"{file} holds {rows_ND.dtype} {rows_ND.shape}; expected float16 [rows, width]"
            )
        return rows_ND

    def _tables(self, number: int, count: int) -> Iterator[Any]:
        """A part's metadata as COLUMNS, in blocks; clip-retrieval's own become the json."""
        if number not in self._files["metadata"]:
            for start in range(0, count, BLOCK_ROWS):
                rows = range(start, min(start + BLOCK_ROWS, count))
                keys = [{"key": f"{number:05d}{row:04d}"} for row in rows]
                yield pa.Table.from_pylist(keys, schema=COLUMNS)
            return
        file = self._files["metadata"][number]
        with _readable(file), pq.ParquetFile(file, memory_map=True) as parquet:
            if parquet.metadata.num_rows != count:
                raise RetrievalError(
                    f"{file}: {parquet.metadata.num_rows} rows beside {count} embeddings"
                )
            start = 0
            for batch in parquet.iter_batches(BLOCK_ROWS):
                table = pa.Table.from_batches([batch])
                if self.facts:
                    yield table.rename_columns(
                        ["key" if name == "image_path" else name for name in table.schema.names]
                    )
                else:
                    rows = enumerate(table.to_pylist(), start)
                    ours = [_as_ours(row, number, n) for n, row in rows]
                    yield pa.Table.from_pylist(ours, schema=COLUMNS)
                start += len(table)


def _as_ours(row: dict[str, Any], number: int, n: int) -> dict[str, Any]:
    caption, url = row.pop("caption", None), row.pop("url", None)
    key = row.pop("key", None) or row.get("image_path") or f"{number:05d}{n:04d}"
    return {
        "key": str(key),
        "caption": str(caption) if caption is not None else None,
        "url": str(url) if url is not None else None,
        "json": json.dumps(row, default=str) if row else None,
    }


@contextmanager
def _readable(file: Path) -> Generator[None]:
    """Raises RetrievalError for what numpy and pyarrow say of a file that is broken."""
    try:
        yield
    except (pa.ArrowInvalid, OSError, ValueError, EOFError) as error:
        raise RetrievalError(f"{file} cannot be read ({error}); make it again") from error


def read_facts(path: Path) -> dict[str, Any]:
    """The contents of embeddings.json.

    Raises:
        RetrievalError: it is not JSON.
    """
    try:
        return json.loads((path / FACTS).read_bytes())
    except ValueError as error:
        raise RetrievalError(
            f"{path / FACTS} is not JSON ({error}); delete {path} and embed again"
        ) from error


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
    told = (table.schema.metadata or {}) | {b"arrays": " ".join(arrays).encode()}
    pq.write_table(renamed.replace_schema_metadata(told), buffer)
    _write(out / "metadata" / f"metadata_{stem}.parquet", buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def parts_done(out: Path) -> set[int]:
    """The numbers of the parts that are whole: a file that was lost or torn is made again."""
    files = {kind: _numbered(out / kind, ".npy") for kind in ("img_emb", "text_emb")}
    done = set[int]()
    for number, file in _numbered(out / "metadata", ".parquet").items():
        try:
            told = pq.read_metadata(file)
            kinds = (told.metadata or {}).get(b"arrays", b"img_emb").decode().split()
            counts = {len(np.load(files[kind][number], mmap_mode="r")) for kind in kinds}
        except (pa.ArrowInvalid, OSError, ValueError, EOFError, KeyError):
            continue
        if counts == {told.num_rows}:
            done.add(number)
    return done


def forget_part(out: Path, number: int) -> None:
    """Make a part one that is missing."""
    for part, file in _numbered(out / "metadata", ".parquet").items():
        if part == number:
            file.unlink()


def _numbered(directory: Path, suffix: str) -> dict[int, Path]:
    """{N: file} of the files named `…_N` and the suffix."""
    found = ((re.search(r"_(\d+)$", file.stem), file) for file in directory.glob(f"*{suffix}"))
    return {int(match[1]): file for match, file in found if match}
