"""Arrow tables: what is known about each row, and the parts a build leaves on its way.

Both are Arrow IPC files, memory-mapped: reading one row touches that row's pages only. A part
holds one shard's metadata and embeddings in one file, so it is there whole or not at all.
"""

# N rows, D embedding width

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clip_retrieval.embed import Part
from clip_retrieval.errors import RetrievalError

COLUMNS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),  # the .txt; several captions on a line each
        pa.field("json", pa.string()),  # the .json as it is
        pa.field("shard", pa.string(), nullable=False),  # the tar's file name
        pa.field("offset", pa.int64(), nullable=False),  # of the image's bytes in the tar
        pa.field("size", pa.int64(), nullable=False),  # of the image, in bytes
    ]
)


def write_part(path: Path, part: Part) -> None:
    """Write one shard's part file, whole or not at all."""
    rows = [asdict(record) | {"shard": part.shard.name} for record in part.records]
    numbers = pa.array(part.embeddings_ND.astype(np.float16).ravel())
    vectors = pa.FixedSizeListArray.from_arrays(numbers, part.embeddings_ND.shape[1])
    table = pa.Table.from_pylist(rows, schema=COLUMNS).append_column("embedding", vectors)
    table = table.replace_schema_metadata({"failed": str(len(part.failures))})
    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def part_counts(path: Path) -> tuple[int, int]:
    """A part's (rows, images that could not be read)."""
    table = _open(path)
    return table.num_rows, int(table.schema.metadata[b"failed"])


def merge_parts(parts: Sequence[Path], metadata: Path) -> Iterator[NDArray[np.float16]]:
    """Write all parts' metadata to one file; yields each part's embeddings [N, D] in turn."""
    with pa.OSFile(str(metadata), "wb") as file, pa.ipc.new_file(file, COLUMNS) as writer:
        for path in parts:
            table = _open(path)
            writer.write_table(table.select(COLUMNS.names).replace_schema_metadata(None))
            for chunk in table["embedding"].chunks:
                yield chunk.flatten().to_numpy().reshape(len(chunk), -1)


class Metadata:
    """The rows of `metadata.arrow`, read one at a time.

    Raises:
        RetrievalError: the file is missing, truncated or has other columns.
    """

    def __init__(self, path: Path) -> None:
        self._table = _open(path)
        if self._table.schema.names != COLUMNS.names:
            raise RetrievalError(
                f"{path} has the columns {self._table.schema.names}; expected {COLUMNS.names}; "
                "build the index again"
            )

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row as {column: value}, the .json parsed."""
        values: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        return values | {"json": json.loads(values["json"]) if values["json"] else None}

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The first caption of each row that has one."""
        column = self._table["caption"]
        found = (column[int(row)].as_py() for row in rows)
        return [caption.splitlines()[0] for caption in found if caption]


def _open(path: Path) -> Any:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise RetrievalError(f"{path} cannot be read ({error}); build the index again") from error
