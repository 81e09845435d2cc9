"""What a source of any kind is once it is open: a stream of records, a reader of their images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_data.errors import RowError
from clip_data.readers import Reader

# A row as the source has it, by column, or what is wrong with it: its detail tells where it stands.
Record = dict[str, Any] | RowError

# Columns that no file has, for what a kind of source knows of a row.
PLACE = "\0place"  # becomes `Row.place`
REMARK = "\0remark"  # becomes `Row.remark`


@dataclass(frozen=True)
class Opened:
    """A source whose columns are known, though not yet which of them are used for what."""

    reader: Reader
    records: Callable[[], Iterator[Record]]
    """Every row in a fixed order, the bad ones included; to be read again and again."""
    columns: list[str]
    image_column: str | None
    """The column of the images' names, where the kind of source tells which it is."""
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """Of columns of class names that have an order: the names in it, unused ones too."""
