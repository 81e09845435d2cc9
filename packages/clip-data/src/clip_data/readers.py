"""Where the images of a source are read from: a reader goes to the workers with the rows."""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from upath import UPath

from clip_data.errors import RowError
from clip_data.samples import Row


class Reader(Protocol):
    """Reads the images of rows. It is pickled; its functions are called from several threads."""

    def images(self, rows: Sequence[Row]) -> Generator[Callable[[], bytes]]:
        """For each row, in order, a function that gives the bytes of its encoded image.

        The function raises RowError where there is none. A reader may start on the rows that
        follow before their functions are called; close it to stop that. Rows with a fault are not
        among them.
        """
        ...

    def version(self, row: Row) -> Any:
        """What changes with the image, as far as that is known without reading it. Of JSON."""
        ...


@dataclass(frozen=True)
class FileReader:
    """Images that are files in a folder, which no link and no `..` may lead out of."""

    root: UPath
    """A local one is absolute, without symbolic links."""

    def images(self, rows: Sequence[Row]) -> Generator[Callable[[], bytes]]:
        """See `Reader`."""
        for row in rows:
            yield partial(read_inside, self.root, row.image)

    def version(self, row: Row) -> int:
        """Bytes of the file, -1 if there is none or it is not on this machine."""
        if not isinstance(self.root, Path):
            return -1
        try:
            return os.stat(os.path.join(self.root, row.image)).st_size
        except (OSError, ValueError):
            return -1


def row_digest(row: Row, reader: Reader, options: str) -> str:
    """A hash of all that decides what is written for a row, as far as its image is known."""
    version = None if row.fault else reader.version(row)
    text = json.dumps([row.fields, version, options], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_inside(root: UPath, name: str) -> bytes:
    """The contents of a regular file in the folder `root`.

    Raises:
        RowError: it lies outside, does not exist or cannot be read.
    """
    try:
        if not isinstance(root, Path):
            if name.startswith("/") or ".." in name.split("/"):
                raise RowError("path outside the source folder", name)
            return (root / name).read_bytes()
        path = _real_path(os.path.join(root, name))
        if not path.startswith(os.path.join(root, "")):
            raise RowError("path outside the source folder", path)
        if not os.path.isfile(path):
            raise RowError("missing file", path)
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise RowError("missing file", str(error)) from error
    except OSError as error:
        raise RowError("unreadable file", str(error)) from error
    except ValueError as error:  # a NUL in the name
        raise RowError("missing file", str(error)) from error


def _real_path(path: str) -> str:
    """`os.path.realpath`, which asks for each folder on the way anew, for many files of few."""
    folder, name = os.path.split(path)
    plain = os.path.join(_real_folder(folder), name)
    return os.path.realpath(path) if name in ("", ".", "..") or os.path.islink(plain) else plain


_real_folder = lru_cache(1024)(os.path.realpath)
