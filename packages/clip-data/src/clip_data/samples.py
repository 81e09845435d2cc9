"""One sample: an image, its captions, its label. From a source's row to the members of a shard."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_data.errors import RowError
from clip_data.images import check_image


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, its image not read yet. Good or bad, it has its place in a shard."""

    image: str
    """Path of the image, relative to the source's folder; of an unreadable row, where it stands."""
    captions: tuple[str, ...] | None = None
    """None: the source has no captions."""
    label: str | None = None
    """Class name. None: the source has no labels."""
    extra: Mapping[str, Any] | None = None
    """The source's other columns."""
    fault: str | None = None
    """Why the row is bad, where that can be told without its image."""


@dataclass(frozen=True)
class Sample:
    """A good row: the bytes of its members by extension, in the order of the tar."""

    members: dict[str, bytes]
    width: int
    height: int


def read_sample(row: Row, key: str, root: str, classes: Mapping[str, int] | None) -> Sample:
    """Read and check the row's image, and encode the members .jpg/.png/.webp, .txt, .json, .cls.

    Args:
        root: the source's folder, an absolute path without symbolic links.
        classes: the number of each class name; None where the source has no labels.

    Raises:
        RowError: the row cannot become a sample.
    """
    if row.fault is not None:
        raise RowError(row.fault)
    if classes is not None and row.label not in classes:
        raise RowError("label not in classnames", repr(row.label))
    picture = check_image(read_inside(root, row.image))
    members = {picture.extension: picture.data}
    if row.captions is not None:
        members["txt"] = "\n".join(row.captions).encode()
    about = {"key": key, "image": row.image, "width": picture.width, "height": picture.height}
    members["json"] = json.dumps({**(row.extra or {}), **about}, default=str).encode()
    if classes is not None and row.label is not None:
        members["cls"] = str(classes[row.label]).encode()
    return Sample(members, picture.width, picture.height)


def read_inside(root: str, name: str) -> bytes:
    """The contents of a regular file in the folder `root`, which no link may lead out of.

    Raises:
        RowError: it lies outside, does not exist or cannot be read.
    """
    try:
        path = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, path]) != root:
            raise RowError("path outside the source folder", path)
        if not os.path.isfile(path):
            raise RowError("missing file", path)
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RowError("unreadable file", str(error)) from error
    except ValueError as error:  # a NUL in the name
        raise RowError("missing file", str(error)) from error
