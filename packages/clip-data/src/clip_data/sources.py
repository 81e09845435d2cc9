"""Sources: folders and tables of images with captions or labels, read as one stream of rows.

Text that is not UTF-8 is carried along as surrogates, as Python does for file names: a strange
file name still opens, and a caption with surrogates is a bad row instead of a failed build.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from clip_data import images, parquet
from clip_data.errors import DataError, RowError
from clip_data.samples import Row, read_inside

# A row as the file has it, or what is wrong with it.
_Record = dict[str, Any] | RowError


@dataclass(frozen=True)
class Columns:
    """The columns that hold the image's path, the captions and the class name."""

    image: str
    caption: str | None
    label: str | None


@dataclass(frozen=True)
class Source:
    """A stream of rows that can be read again and again, and the folder their paths start from."""

    root: Path
    columns: Columns
    records: Callable[[], Iterator[_Record]]

    def rows(self) -> Iterator[Row]:
        """Every row in a fixed order, the bad ones included."""
        for record in self.records():
            if isinstance(record, RowError):
                yield Row(record.detail, fault=record.reason)
            else:
                yield self._row(record)

    def _row(self, record: dict[str, Any]) -> Row:
        extra = dict(record)
        image = extra.pop(self.columns.image, None)
        captions, label, fault = None, None, None
        if self.columns.caption is not None:
            captions = _captions(extra.pop(self.columns.caption, None))
            if not captions:
                fault = "empty caption"
            elif not _is_utf8("".join(captions)):
                fault = "caption is not UTF-8"
        if self.columns.label is not None:
            label = _label(extra.pop(self.columns.label, None))
            if label is None:
                fault = "no label"
            elif not _is_utf8(label):
                label, fault = None, "label is not UTF-8"
        if not isinstance(image, str) or not image:
            image, fault = "", "no image path"
        return Row(image, captions, label, extra, fault)


def open_source(
    path: Path, image_column: str, caption_column: str | None, label_column: str | None
) -> Source:
    """Recognise a source and find its columns.

    Args:
        caption_column: None takes `caption` where there is such a column.
        label_column: None where the source has no class names; a folder per class needs none.

    Raises:
        DataError: there is no such source, it is of no known kind, or a column is missing.
    """
    if path.is_dir():
        return _open_folder(path, caption_column or "caption", label_column)
    if not path.is_file():
        raise DataError(f"{path}: no such source; expected a folder of images or a table of paths")
    read = _TABLES.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path}: unknown kind of source; expected a folder or {', '.join(_TABLES)}"
        )
    found = _table_columns(path, read)
    if caption_column is None and ("caption" in found or label_column is None):
        caption_column = "caption"
    for option, name in {
        "--image-column": image_column,
        "--caption-column": caption_column,
        "--label-column": label_column,
    }.items():
        if name is not None and name not in found:
            raise DataError(
                f"{path}: no column {name!r}; found {', '.join(map(repr, found))}; give {option}"
            )
    columns = Columns(image_column, caption_column, label_column)
    return Source(path.resolve().parent, columns, partial(read, path))


# Folders ------------------------------------------------------------------------------------------


def _open_folder(folder: Path, caption_column: str, label_column: str | None) -> Source:
    """Captions beside the images (KEY.txt, KEY.json), else a folder per class."""
    root = folder.resolve()
    if any(beside for _, beside in _walk(root)):
        columns = Columns("image", caption_column, label_column)
        return Source(root, columns, partial(_captioned, root, caption_column))
    if not any(os.sep in image for image, _ in _walk(root)):
        raise DataError(
            f"{folder}: no images ({', '.join(images.SUFFIXES)}) with captions beside them "
            "(KEY.txt, or KEY.json with a caption), nor folders of images, one per class"
        )
    return Source(root, Columns("image", None, "class"), partial(_classes, root))


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(path of an image, suffixes of the caption files beside it), by folder and name."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        names = set(files)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in images.SUFFIXES:
                image = os.path.relpath(os.path.join(folder, name), root)
                yield image, [beside for beside in (".txt", ".json") if stem + beside in names]


def _captioned(root: Path, caption_column: str) -> Iterator[_Record]:
    for image, beside in _walk(root):
        stem = os.path.splitext(image)[0]
        try:
            record = {}
            if ".json" in beside:
                record = _json_object(read_inside(str(root), stem + ".json"))
            if ".txt" in beside:
                text = read_inside(str(root), stem + ".txt").decode("utf-8-sig", "surrogateescape")
                record[caption_column] = text.splitlines()
            yield {**record, "image": image}
        except RowError as error:
            yield RowError(error.reason, image)


def _classes(root: Path) -> Iterator[_Record]:
    for image, _ in _walk(root):
        first, separator, _ = image.partition(os.sep)
        yield {"image": image, "class": first if separator else None}


# Tables -------------------------------------------------------------------------------------------


def _read_csv(path: Path, delimiter: str) -> Iterator[_Record]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter)
        header = next(lines, [])
        try:
            for line in lines:
                if len(line) == len(header):
                    yield dict(zip(header, line, strict=True))
                elif line:  # an empty line is no row
                    yield RowError("wrong number of columns", f"line {lines.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.line_num}: not readable ({error})") from error


def _read_jsonl(path: Path) -> Iterator[_Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield _json_object(line)
            except RowError as error:
                yield RowError(error.reason, f"line {number}")


_TABLES: dict[str, Callable[[Path], Iterator[_Record]]] = {
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": parquet.read_records,
}


def _table_columns(path: Path, read: Callable[[Path], Iterator[_Record]]) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return parquet.read_columns(path)
    for record in read(path):
        if isinstance(record, dict):
            return list(record)
    raise DataError(f"{path}: no rows; expected one for each image")


# Values -------------------------------------------------------------------------------------------


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RowError("not a JSON object")
    return cast(dict[str, Any], value)


def _captions(value: Any) -> tuple[str, ...]:
    """The captions in a column: one, or a list; each on one line, the empty ones dropped."""
    values: list[Any] = value if isinstance(value, list) else [value]
    lines = (" ".join(text.splitlines()).strip() for text in values if isinstance(text, str))
    return tuple(line for line in lines if line)


def _label(value: Any) -> str | None:
    """The class name; an empty one is a class too. Anything but text and whole numbers is none."""
    return " ".join(str(value).splitlines()) if isinstance(value, str | int) else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates
        return False
    return True
