"""WebDataset tars as a source: ours, img2dataset's, and the splits of CLIP_benchmark's sets."""

import json
import os
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from upath import UPath

from clip_data.errors import DataError, RowError
from clip_data.images import SUFFIXES
from clip_data.labelled_set import CLASS_NAMES, read_lines
from clip_data.opened import PLACE, REMARK, Opened, Record
from clip_data.samples import Row
from clip_data.tables import json_object
from clip_data.tar import FORMAT, Span, Spans, index_path, read_samples, read_span, tar_size

_IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_WRITTEN_ANEW = ("key", "image", "width", "height")  # of .json, by whoever builds from these rows
_TRUNCATED = "tar truncated or damaged"
_OPEN_FILES = 64


def is_tars(path: UPath) -> bool:
    """Whether `open_tars` opens it: a tar, a folder of tars, a set of splits."""
    return path.suffix.lower() == ".tar" or any(
        True for pattern in ("*.tar", "*/nshards.txt") for _ in path.glob(pattern)
    )


def open_tars(source: UPath) -> Opened:
    """A tar, or a folder of them: a row for each sample, in the order of the tars' numbers.

    The columns are image, caption (of .txt, a line each, else of .json), class (of .cls, by its
    name if there is a classnames.txt) and the other fields of .json, as the first good sample has
    them.

    Raises:
        DataError: there are no tars, or several splits to choose from.
    """
    tars = [source] if source.suffix.lower() == ".tar" else list(source.glob("*.tar"))
    if not tars:
        splits = sorted({path.parent for path in source.glob("*/*.tar")}, key=str)
        if len(splits) == 1:
            return open_tars(splits[0])
        found = f"found the splits {', '.join(map(str, splits))}; give one" if splits else ""
        raise DataError(f"{source}: no tars; {found or 'expected a .tar file or a folder of them'}")
    folder = tars[0].parent.absolute()
    files = (folder / CLASS_NAMES, folder.parent / CLASS_NAMES)
    names = next((read_lines(file) for file in files if file.is_file()), None)
    classes = None if names is None else {str(n): name for n, name in enumerate(names)}
    records = partial(_records, sorted(tars, key=_number), classes)
    first = next((record for record in records() if isinstance(record, dict)), {"image": ""})
    columns = [name for name in first if name not in (PLACE, REMARK)]
    ordered = {} if names is None else {"class": names}
    return Opened(TarReader(folder), records, columns, "image", ordered)


def _number(tar: UPath) -> tuple[float, str]:
    return float(tar.stem) if tar.stem.isdecimal() else float("inf"), tar.name


# Rows ---------------------------------------------------------------------------------------------


def _records(tars: list[UPath], classes: dict[str, str] | None) -> Iterator[Record]:
    for tar in tars:
        keys = set[str]()
        try:
            with tar.open("rb") as file:
                for key, spans in _samples(tar, file):
                    try:
                        _check_key(key, keys)
                        yield _record(f"{tar.name}/{key}", tar.name, file, spans, classes)
                    except RowError as error:
                        yield RowError(error.reason, f"{tar.name}/{key}")
        except tarfile.TarError:
            yield RowError(_TRUNCATED, tar.name)


def _samples(tar: UPath, file: BinaryIO) -> Iterator[Spans]:
    """By the index beside the tar if it is of a tar of this size, else by the tar's headers."""
    try:
        index = json.loads(index_path(tar).read_bytes())
    except (FileNotFoundError, ValueError):
        index = {}
    if (index.get("format"), index.get("tar_bytes")) != (FORMAT, tar_size(file)):
        yield from read_samples(file)
        return
    for row, key in enumerate(index["keys"]):
        yield key, {e: spans[row] for e, spans in index["members"].items() if spans[row]}


def _check_key(key: str, keys: set[str]) -> None:
    if key.startswith("/") or ".." in key.split("/"):
        raise RowError("unsafe name in tar")
    if key in keys:
        raise RowError("duplicate key")
    keys.add(key)


def _record(
    name: str, tar: str, file: BinaryIO, spans: dict[str, Span], classes: dict[str, str] | None
) -> dict[str, Any]:
    images = [extension for extension in _IMAGES if extension in spans]
    if not images:
        raise RowError("no image")
    record: dict[str, Any] = {"image": f"{name}.{images[0]}"}
    if "json" in spans:
        about = json_object(read_span(file, spans["json"]))
        record |= {field: value for field, value in about.items() if field not in _WRITTEN_ANEW}
    if "txt" in spans:
        text = read_span(file, spans["txt"]).decode("utf-8-sig", "surrogateescape")
        record["caption"] = text.splitlines()
    if "cls" in spans:
        record["class"] = _class_name(read_span(file, spans["cls"]), classes)
    record[PLACE] = (tar, *spans[images[0]])
    if len(images) > 1:
        record[REMARK] = f"several images ({', '.join(images)}): the first is taken"
    return record


def _class_name(data: bytes, classes: dict[str, str] | None) -> str:
    text = data.decode("utf-8", "surrogateescape").strip()
    if classes is None:
        return text
    if text not in classes:
        raise RowError("label not in classnames")
    return classes[text]


# Images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarReader:
    """Images by their offset in the tars of a folder; a row's place is (tar, offset, bytes)."""

    folder: UPath

    def images(self, rows: Sequence[Row]) -> Generator[Callable[[], bytes]]:
        """See `Reader`."""
        # Open as long as these rows are read: a tar may be written anew before the next ones.
        opened = lru_cache(_OPEN_FILES)(self._open)
        for row in rows:
            yield partial(self._read, opened, *row.place)

    def version(self, row: Row) -> int:
        """Bytes of the image."""
        return row.place[2]

    def _open(self, tar: str) -> BinaryIO:
        return Path(str(self.folder / tar)).open("rb", buffering=0)  # closed when it is dropped

    def _read(self, opened: Callable[[str], BinaryIO], tar: str, offset: int, size: int) -> bytes:
        try:
            if isinstance(self.folder, Path):
                file = opened(tar)  # held while it is read: another thread may drop it meanwhile
                data = os.pread(file.fileno(), size, offset)
            else:
                path = self.folder / tar
                fs: Any = path.fs
                data = fs.cat_file(path.path, start=offset, end=offset + size)
        except OSError as error:
            raise RowError("unreadable file", str(error)) from error
        if len(data) < size:
            raise RowError(_TRUNCATED, f"{tar}: {len(data)} of {size} bytes at {offset}")
        return data
