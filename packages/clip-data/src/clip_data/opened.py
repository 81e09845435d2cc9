"""What every kind of source is once it is open: a stream of records, and a reader of their images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clip_data.errors import RowError
from clip_data.readers import Reader

# A row as the source has it, by column, or what is wrong with it: its detail tells where it stands.
Record = dict[str, Any] | RowError

PLACE = "\0place"  # the column, no file has one of this name, that becomes `Row.place`


@dataclass(frozen=True)
class Opened:
    """A source whose columns are known, though not yet which of them are used for what."""

    reader: Reader
    records: Callable[[], Iterator[Record]]
    """Every row in a fixed order, the bad ones included; to be read again and again."""
    columns: list[str]
    image_column: str | None
    """The column of the images' names, where the kind of source tells which it is."""
