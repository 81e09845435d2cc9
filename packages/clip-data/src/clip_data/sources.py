"""A source, whatever its kind, as one stream of rows.

Text that is not UTF-8 is carried along as surrogates, as Python does for file names: a strange
file name still opens, and a caption with surrogates is a bad row instead of a failed build.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from upath import UPath

from clip_data.download import DownloadOptions, UrlReader
from clip_data.errors import DataError, RowError
from clip_data.folders import open_folder
from clip_data.hf_source import is_hf, open_hf
from clip_data.opened import PLACE, REMARK, Opened
from clip_data.readers import Reader
from clip_data.samples import Row
from clip_data.tables import TABLES, open_table
from clip_data.tar_source import is_tars, open_tars

# Where no option names them, the first of these columns that is there. LAION's are in capitals.
_IMAGE = ("image",)
_URL = ("url", "URL")
_CAPTION = ("caption", "TEXT", "text")
CLASS = "class"  # a folder per class, and tars with .cls, have this column


@dataclass(frozen=True)
class ColumnOptions:
    """The columns that a user has named. None or nothing: the usual names."""

    image: str | None = None
    """Paths of files."""
    url: str | None = None
    """Addresses to download from."""
    captions: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns that hold the image's name, its captions and its class name."""

    image: str
    captions: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class Source:
    """A stream of rows that can be read again and again, and the reader of their images."""

    opened: Opened
    columns: Columns
    reader: Reader

    @property
    def class_names(self) -> Sequence[str]:
        """The class names in the source's own order, if it has one."""
        return self.opened.class_names.get(self.columns.label or "", ())

    def rows(self) -> Iterator[Row]:
        """Every row in a fixed order, the bad ones included."""
        for record in self.opened.records():
            if isinstance(record, RowError):
                yield Row(record.detail, fault=record.reason)
            else:
                yield self._row(record)

    def _row(self, record: dict[str, Any]) -> Row:
        extra = dict(record)
        image = extra.pop(self.columns.image, None)
        place, remark = extra.pop(PLACE, ()), extra.pop(REMARK, None)
        captions, label, fault = None, None, None
        if self.columns.captions:
            values = [extra.pop(column, None) for column in self.columns.captions]
            captions = tuple(line for value in values for line in _captions(value))
            fault = _caption_fault(captions)
        if self.columns.label is not None:
            label = _label(extra.pop(self.columns.label, None))
            if label is None:
                fault = "no label"
            elif not _is_utf8(label):
                label, fault = None, "label is not UTF-8"
        if not isinstance(image, str) or not image:
            image, fault = "", "no image path"
        return Row(image, captions, label, extra, fault, tuple(place), remark)


def open_source(
    source: str, columns: ColumnOptions, split: str | None, downloads: DownloadOptions
) -> Source:
    """Recognise a source and find its columns.

    Args:
        split: of a Hugging Face data set with several.

    Raises:
        DataError: there is no such source, it is of no known kind, or a column is missing.
    """
    opened = _open(source, split, columns)
    image, reader = columns.image or opened.image_column, opened.reader
    url = columns.url
    if image is None and url is None:
        image = _first(_IMAGE, opened.columns)
        url = None if image else _first(_URL, opened.columns)
    if url is not None:
        image, reader = url, UrlReader(downloads)
    captions = columns.captions
    if not captions and (found := _first(_CAPTION, opened.columns)):
        captions = (found,)
    label = columns.label
    if label is None and CLASS in opened.columns and not captions:
        label = CLASS
    wanted = [("--image-column or --url-column", image or _IMAGE[0]), ("--label-column", label)]
    expected = captions or (() if label else _CAPTION[:1])
    wanted += [("--caption-column", name) for name in expected]
    if url is not None:
        wanted.append(("--hash-column", downloads.hash_column))
    for option, name in wanted:
        if name is not None and name not in opened.columns:
            raise DataError(
                f"{source}: no column {name!r}; found {', '.join(map(repr, opened.columns))}; "
                f"give {option}"
            )
    return Source(opened, Columns(image or "", captions, label), reader)


def _open(source: str, split: str | None, columns: ColumnOptions) -> Opened:
    if columns.url is None and is_hf(source):
        return open_hf(source, split, columns.image)
    path = UPath(source)
    suffix = path.suffix.lower()
    if is_tars(path):
        return open_tars(path)
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        return open_table(path, tables) if tables else open_folder(path)
    if not path.is_file():
        raise DataError(f"{source}: no such source; expected a folder of images, a table or tars")
    if suffix not in TABLES:
        kinds = ", ".join((*TABLES, ".tar", ".arrow"))
        raise DataError(f"{source}: unknown kind of source; expected a folder or {kinds}")
    return open_table(path, [path])


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


# Values -------------------------------------------------------------------------------------------


def _captions(value: Any) -> Iterator[str]:
    """The captions in a column: one, or a list; each on one line, the empty ones dropped."""
    values: list[Any] = value if isinstance(value, list) else [value]
    lines = (" ".join(text.splitlines()).strip() for text in values if isinstance(text, str))
    return (line for line in lines if line)


def _caption_fault(captions: tuple[str, ...]) -> str | None:
    text = "".join(captions)
    if not text:
        return "empty caption"
    if not _is_utf8(text):
        return "caption is not UTF-8"
    return "caption with a NUL" if "\0" in text else None


def _label(value: Any) -> str | None:
    """The class name; an empty one is a class too. Anything but text and whole numbers is none."""
    return " ".join(str(value).splitlines()) if isinstance(value, str | int) else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates
        return False
    return True
