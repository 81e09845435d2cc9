"""Samples chosen by the columns of their shard's parquet, with an SQL expression.

SQLite evaluates it over a table in memory. It may read that table's columns and call the functions
listed here, all of them pure: no subquery, no file, no setting, nothing random.
"""

import json
import os
import re
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from upath import UPath

from clip_data.errors import DataError
from clip_data.selection import Selected, source_tars, write_selection
from clip_data.sidecars import read_keys, read_table
from clip_data.workers import run_jobs

_FUNCTIONS = """
    -> ->> abs ceil ceiling coalesce exp floor glob hex ifnull iif instr json_array_length
    json_extract json_type json_valid length like ln log log10 log2 lower ltrim max min mod nullif
    pow power replace round rtrim sign sqrt substr substring trim trunc typeof unicode upper
"""

# Texts that stay texts: in all other columns a text that is a number, as a CSV's are, becomes one.
_TEXTS = "key image url caption text label status reason detail error_message digest sha256 exif"

_LONGEST = 1 << 24  # bytes of a value: replace() within replace() could fill the memory

# What a double quote may stand in without opening a name, and a name in double quotes.
_QUOTED = re.compile(
    r"'(?:[^']|'')*'|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/"
    r'|"((?:[^"]|"")*)"',
    re.DOTALL,
)


def filter_shards(
    source: str | Path | UPath,
    output: str | Path | UPath,
    *,
    where: str,
    workers: int | None = None,
) -> Selected:
    """Write the samples for whose row in NNNNN.parquet an SQL expression is true.

    Args:
        source: a folder of shards with a parquet each, ours or img2dataset's.
        output: the folder of the new shards.
        where: what SQL has after WHERE, such as `similarity > 0.3 AND min(width, height) >= 256
            AND NSFW = 'UNLIKELY' AND length(caption) > 5`. A row for which it is NULL goes, as in
            SQL; so compare a column that has gaps with IS. An empty text is NULL, but for captions
            and the other columns of texts; lists and objects are JSON texts, booleans 0 and 1. Of
            two columns whose names differ in nothing but case, the latter's has _2 at its end. A
            key that has several rows stays if one of them does.
        workers: processes; None for one per core.

    Raises:
        DataError: a shard has no parquet, the expression is none or does what it may not, or see
            `write_selection`.
    """
    source, output = UPath(source), UPath(output)
    tars = source_tars(source)
    matching = partial(_matching_keys, where=where)
    matching(tars[0])  # a wrong expression shall not show after an hour
    workers = min(workers or os.cpu_count() or 1, len(tars))
    with closing(run_jobs(matching, tars, workers)) as keep:
        arguments = {"command": "filter", "where": where}
        return write_selection(source, output, keep, arguments=arguments, workers=workers)


def _matching_keys(tar: UPath, where: str) -> tuple[UPath, frozenset[str]]:
    """The keys in the tar that have a row for which the expression is true."""
    table = read_table(tar)
    path = tar.with_suffix(".parquet")
    if table is None or "key" not in table.column_names:
        raise DataError(f"{path}: expected the columns of {tar.name} and their keys in it")
    names = _distinct(table.column_names)
    with closing(sqlite3.connect(":memory:")) as database:
        try:
            columns = (f"{_quote(n)} {'TEXT' if _is_text(n) else 'NUMERIC'}" for n in names)
            database.execute(f"CREATE TABLE samples ({', '.join(columns)})")
            values = (
                [_as_sql(value, _is_text(name)) for value in column.to_pylist()]
                for name, column in zip(names, table.columns, strict=True)
            )
            insert = f"INSERT INTO samples VALUES ({', '.join('?' * len(names))})"
            database.executemany(insert, zip(*values, strict=True))
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            database.set_authorizer(_Authorizer())
            expression = _QUOTED.sub(_never_a_text, where)
            found = database.execute(f"SELECT key FROM samples WHERE (\n{expression}\n)")
            keys = frozenset(str(key) for (key,) in found)
        except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError) as error:
            raise DataError(
                f"{path}: {where!r}: {error}; expected an SQL expression over the columns "
                f"{', '.join(names)}"
            ) from error
    return tar, keys.intersection(read_keys(tar, trust_parquet=False))


class _Authorizer:
    """Allows one SELECT of columns, with some functions."""

    def __init__(self) -> None:
        self._selects = 0

    def __call__(self, action: int, first: str | None, second: str | None, *_: Any) -> int:
        if action == sqlite3.SQLITE_SELECT:
            self._selects += 1
        allowed = (
            action == sqlite3.SQLITE_READ
            or (action == sqlite3.SQLITE_SELECT and self._selects == 1)
            or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS.split())
        )
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _never_a_text(quoted: re.Match[str]) -> str:
    """A "name" as a `name`: SQLite takes an unknown name in double quotes for a text."""
    if quoted[1] is None:
        return quoted[0]
    return "`" + quoted[1].replace('""', '"').replace("`", "``") + "`"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _distinct(names: list[str]) -> list[str]:
    """Names that differ, in more than their case."""
    seen = dict[str, int]()
    result: list[str] = []
    for name in names:
        number = seen[name.lower()] = seen.get(name.lower(), 0) + 1
        result.append(name if number == 1 else f"{name}_{number}")
    return result


def _is_text(name: str) -> bool:
    return name.lower() in _TEXTS.split()


def _as_sql(value: Any, is_text: bool) -> Any:
    """A value as SQLite has it."""
    if value is None or isinstance(value, float | bytes):
        return value
    if isinstance(value, str):
        return value if value or is_text else None
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    return str(value)  # a date, a decimal, an integer of more than 64 bits
