"""Hugging Face data sets: from `save_to_disk`, Arrow files, Parquet with image bytes, the hub.

`datasets` makes memory-mapped Arrow files of them all, in its cache of Parquet and the hub's. In
Parquet a whole row group must be decoded to get at one image, which after a shuffle is a hundred
megabytes for each; in Arrow an image is a slice of a file. Rows and images are then read from the
Arrow files directly: workers need not import `datasets`, and memory does not grow with the rows.
"""

import glob
import logging
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from upath import UPath

from clip_data.errors import DataError, RowError
from clip_data.opened import PLACE, Opened, Record
from clip_data.readers import FileReader, read_inside
from clip_data.samples import Row

log = logging.getLogger(__name__)

_compute: Any = pyarrow.compute  # which makes its functions when it is imported

_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:#(.+))?")
_SAVED = ("state.json", "dataset_dict.json")
_BATCH = 1024  # rows in memory at a time
_OPEN_FILES = 64


def is_hf(path: str | UPath) -> bool:
    """Whether `open_hf` opens it; Parquet only where a column may hold encoded images."""
    if _HUB.fullmatch(str(path)):
        return True
    path = UPath(path)
    if path.suffix.lower() == ".arrow" or any((path / name).is_file() for name in _SAVED):
        return True
    for file in _parquet_files(path)[:1]:
        try:
            with file.open("rb") as opened:
                return any(_holds_bytes(column.type) for column in pq.read_schema(opened))
        except pa.ArrowInvalid:
            return False  # whoever reads it as a table will say what it is
    return False


def open_hf(source: str | UPath, split: str | None, image_column: str | None = None) -> Opened:
    """A data set's rows in order, ClassLabels by their names.

    Args:
        source: a path, or hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME#CONFIGURATION.
        split: None where there is only one.
        image_column: None takes the first of type `datasets.Image`, else the first with bytes.

    Raises:
        DataError: `datasets` cannot open it, or it has no such split or no column of images.
    """
    from datasets import ClassLabel, Dataset
    from datasets.exceptions import DatasetsError

    try:
        found, roots = _load(source)
    except DataError:
        raise
    # a wrong archive, a damaged file, no network, a data set that is a script
    except (DatasetsError, pa.ArrowException, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{source}: `datasets` cannot open it: {reason}") from error
    splits = {str(found.split or "train"): found} if isinstance(found, Dataset) else dict(found)
    if split is None and len(splits) == 1:
        (split,) = splits
    if split is None or split not in splits:
        wrong = "several splits" if split is None else f"no split {split!r}"
        raise DataError(f"{source}: {wrong}; found {', '.join(splits)}; give --source-split")
    dataset = splits[split]
    features = dict(dataset.features)
    image = _image_column(source, features, image_column)
    classes = {n: list(f.names) for n, f in features.items() if isinstance(f, ClassLabel)}
    others: list[str] = []
    for column in dataset.features.arrow_schema:
        if column.name != image and not _holds_bytes(column.type):
            others.append(column.name)
        elif column.name != image:
            log.info("%s: column %r holds bytes: left out", source, column.name)
    files = tuple(file["filename"] for file in dataset.cache_files)
    records = partial(_records, files, image, others, classes)
    return Opened(ArrowReader(files, image, roots), records, [image, *others], image, classes)


def _load(source: str | UPath) -> tuple[Any, tuple[str, ...]]:
    """A Dataset or a DatasetDict, and the folders that paths in it may lead to."""
    import datasets
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    load: Any = datasets.load_dataset
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    hub = _HUB.fullmatch(str(source))
    if hub is not None:
        folders = (HF_HUB_CACHE, HF_DATASETS_CACHE)
        found = load(f"hf://datasets/{hub[1]}", hub[2], keep_in_memory=False)
        return found, tuple(map(str, folders))
    path = UPath(source)
    if files := _parquet_files(path):
        name = str(files[0])
        where = {"data_files": glob.escape(name) if isinstance(path, Path) else name}
        if path.is_dir():
            where = {"data_dir": str(path)}
        options = dict(path.storage_options) or None
        found = load("parquet", **where, storage_options=options, keep_in_memory=False)
    elif not isinstance(path, Path):
        raise DataError(f"{source}: Arrow files are read where they are; copy it to this machine")
    elif path.suffix.lower() == ".arrow":
        found = datasets.Dataset.from_file(str(path))
    else:
        found = datasets.load_from_disk(str(path), keep_in_memory=False)
    return found, (os.path.realpath(str(path if path.is_dir() else path.parent)),)


def _parquet_files(path: UPath) -> list[UPath]:
    """The file itself, or those in a folder, or in its `data`, as in repositories of the hub."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        return [path]
    return sorted(path.glob("*.parquet"), key=str) or sorted(path.glob("data/*.parquet"), key=str)


def _image_column(source: str | UPath, features: Mapping[str, Any], named: str | None) -> str:
    from datasets import Image, List, Value

    def has_bytes(feature: Any) -> bool:
        value = feature.get("bytes") if isinstance(feature, dict) else feature
        return isinstance(value, Value) and value.dtype in ("binary", "large_binary")

    names = list(features) if named is None else [named]
    if named is None or named in features:
        for name in names:
            if isinstance(features[name], Image):
                return name
        for name in names:
            if has_bytes(features[name]):
                return name
    found = ", ".join(f"{name} ({feature})" for name, feature in features.items())
    lists = any(isinstance(f, List) and isinstance(f.feature, Image) for f in features.values())
    raise DataError(
        f"{source}: no column{f' {named!r}' if named else ''} of images; found {found}; expected "
        f"an image or its encoded bytes{', not a list of images,' if lists else ''} in each row"
    )


def _holds_bytes(kind: Any) -> bool:
    """Whether values of an Arrow type hold bytes, at whatever depth."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    if any(test(kind) for test in is_bytes):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


# Rows ---------------------------------------------------------------------------------------------


def _records(
    files: tuple[str, ...], image: str, others: list[str], classes: Mapping[str, list[str]]
) -> Iterator[Record]:
    first = 0  # of the file's rows, counted over all files
    for number, file in enumerate(files):
        row = 0
        try:
            for batch in _batches(file):
                columns = {name: batch.column(name).to_pylist() for name in others}
                for name in classes:
                    columns[name] = [_class_name(v, classes[name]) for v in columns[name]]
                names, sizes = _about_images(batch.column(image))
                for at in range(len(batch)):
                    record = {name: values[at] for name, values in columns.items()}
                    record[image] = names[at] or f"row {first + row}"
                    yield {**record, PLACE: (number, row, sizes[at])}
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: damaged Arrow file ({error}); make it anew") from error
        first += row


def _batches(file: str) -> Iterator[Any]:
    with pa.memory_map(file) as mapped, pa.ipc.open_stream(mapped) as stream:
        for batch in stream:
            for start in range(0, len(batch), _BATCH):
                yield batch.slice(start, _BATCH)


def _about_images(column: Any) -> tuple[list[str | None], list[int]]:
    """The paths of the images, and how many bytes each has (-1: none); of the bytes nothing."""
    paths, data = pa.nulls(len(column)), column
    if pa.types.is_struct(column.type):
        fields = {field.name for field in column.type}
        data = _compute.struct_field(column, "bytes")
        paths = _compute.struct_field(column, "path") if "path" in fields else paths
    return paths.to_pylist(), _compute.fill_null(_compute.binary_length(data), -1).to_pylist()


def _class_name(value: int | None, names: list[str]) -> str | None:
    """None where there is no label, which may be written as -1."""
    return names[value] if value is not None and 0 <= value < len(names) else None


# Images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrowReader:
    """Images in memory-mapped Arrow files; a row's place is (file, row in it, bytes)."""

    files: tuple[str, ...]
    column: str
    roots: tuple[str, ...]
    """The folders that the path of an image without bytes may lead into."""

    def images(self, rows: Sequence[Row]) -> Generator[Callable[[], bytes]]:
        """See `Reader`."""
        opened = lru_cache(_OPEN_FILES)(self._open)  # in any of the threads that read these rows
        for row in rows:
            yield partial(self._read, opened, row)

    def version(self, row: Row) -> int:
        """Bytes of the image: a fingerprint of `datasets` changes with the folder and the clock."""
        return row.place[2] if row.place[2] >= 0 else FileReader(UPath(self.roots[0])).version(row)

    def _open(self, number: int) -> Any:
        stream = pa.ipc.open_stream(pa.memory_map(self.files[number]))
        return stream.read_all().column(self.column)

    def _read(self, opened: Callable[[int], Any], row: Row) -> bytes:
        number, at, _ = row.place
        value = opened(number)[at].as_py()
        data, path = value, None
        if isinstance(value, dict):
            data, path = value["bytes"], value.get("path")
        if data is not None:
            return data
        if not path:
            raise RowError("no image", "neither bytes nor a path")
        root = next((root for root in self.roots if path.startswith(root + "/")), self.roots[0])
        return read_inside(UPath(os.path.realpath(root)), path)
