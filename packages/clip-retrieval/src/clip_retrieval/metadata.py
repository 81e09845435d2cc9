"""What is known about each row: an Arrow IPC file, memory-mapped.

Reading one row touches that row's pages only, thumbnails and all.
"""

import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clip_retrieval.errors import RetrievalError
from clip_retrieval.vectors import Int64

COLUMNS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),  # the .txt; several captions on a line each
        pa.field("url", pa.string()),
        pa.field("json", pa.string()),  # the .json as it is
        pa.field("shard", pa.string()),  # the file that holds the picture, within its source
        pa.field("offset", pa.int64()),  # of the picture's bytes in that file
        pa.field("size", pa.int64()),  # of the picture, in bytes
        pa.field("thumbnail", pa.binary()),  # JPEG
    ]
)
_IN_A_BATCH = 10_000  # rows


class MetadataWriter:
    """Writes `metadata.arrow` table by table."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, COLUMNS)

    def write(self, table: Any) -> None:
        """Append a table of COLUMNS."""
        columns = table.select(COLUMNS.names).replace_schema_metadata(None).cast(COLUMNS)
        self._writer.write_table(columns, max_chunksize=_IN_A_BATCH)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
        self._file.close()


class Metadata:
    """The rows of `metadata.arrow`.

    Raises:
        RetrievalError: the file is missing, truncated or has other columns.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.table: Any = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise RetrievalError(
                f"{path} cannot be read ({error}); build the index again"
            ) from error
        if self.table.schema.names != COLUMNS.names:
            raise RetrievalError(
                f"{path} has the columns {self.table.schema.names}; expected {COLUMNS.names}; "
                "build the index again"
            )

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row as {column: value}, the .json parsed, without its thumbnail."""
        columns = self.table.drop_columns("thumbnail")
        values: dict[str, Any] = columns.slice(row, 1).to_pylist()[0]
        return values | {"json": _parse_json(values["json"])}

    def thumbnail(self, row: int) -> bytes | None:
        """The row's JPEG, if the index keeps them."""
        return self.table["thumbnail"][row].as_py()

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The first caption of each row that has one."""
        column = self.table["caption"]
        found = (column[int(row)].as_py() for row in rows)
        return [caption.splitlines()[0] for caption in found if caption]

    def matching(self, where: str) -> Int64:
        """The rows that a filter lets through.

        Args:
            where: `NAME OP VALUE`, several with `and` between them. NAME is a column or a name in
                the .json; OP is = != < <= > >= or ~ (contains, whatever the case). A VALUE may
                be in quotes; of a truth value it is true or false.

        Raises:
            RetrievalError: it cannot be read, or no row has the name.
        """
        tests = _parse(where.strip())
        in_json = [name for name, _ in tests if name not in COLUMNS.names]
        found = np.ones(len(self), bool)
        seen = set[str]()
        columns = {name: self.table[name] for name, _ in tests if name in COLUMNS.names}
        for row, values in enumerate(self._values(columns, parse=bool(in_json))):
            for name, test in tests:
                value = values.get(name)
                if value is not None:
                    seen.add(name)
                found[row] &= value is not None and test(value)
        if unknown := [name for name in in_json if name not in seen]:
            raise RetrievalError(
                f"--where {where!r}: no row has {unknown[0]!r}; the columns are "
                f"{', '.join(COLUMNS.names[:-1])}, other names are looked up in each row's json"
            )
        return np.flatnonzero(found)

    def _values(self, columns: dict[str, Any], *, parse: bool) -> Iterator[dict[str, Any]]:
        texts = self.table["json"] if parse else [None] * len(self)
        for row, text in enumerate(texts):
            parsed = text.as_py() if text is not None else None
            own = _parse_json(parsed)
            known = own if isinstance(own, dict) else {}
            yield known | {name: column[row].as_py() for name, column in columns.items()}


def _parse_json(text: str | None) -> Any:
    """A .json member; one that is not JSON stays text."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "~": lambda value, part: str(part).lower() in str(value).lower(),
}


_TERM = re.compile(
    r"""\s*([\w.-]+)\s*(!=|<=|>=|=|<|>|~)\s*(?:(["'])(.*?)\3|(.+?))(?:\s+and\s+|$)""",
    re.IGNORECASE | re.DOTALL,
)


def _parse(where: str) -> list[tuple[str, Callable[[Any], bool]]]:
    """`NAME OP VALUE and …` -> each name and a test of its value."""
    tests: list[tuple[str, Callable[[Any], bool]]] = []
    place = 0
    while place < len(where) or not tests:
        match = _TERM.match(where, place)
        if match is None:
            raise RetrievalError(
                f"--where {where[place:]!r} is not `NAME OP VALUE` with = != < <= > >= or ~ "
                "(contains)"
            )
        tests.append((match[1], _test(match[2], match[5] or match[4])))
        place = match.end()
    return tests


def _test(sign: str, text: str) -> Callable[[Any], bool]:
    """A test of a value; numbers compare as numbers."""
    compare = _OPERATORS[sign]
    try:  # an integer as itself: a float has 53 bits
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        number = None

    def test(value: Any) -> bool:
        if number is not None and isinstance(value, int | float) and sign != "~":
            return compare(value, number)
        if isinstance(value, bool):
            return compare(str(value).lower(), text.lower())
        return compare(str(value), text)

    return test
