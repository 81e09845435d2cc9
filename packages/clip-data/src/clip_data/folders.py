"""Folders of images, with captions beside them or one per class."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from upath import UPath

from clip_data import images
from clip_data.errors import DataError, RowError
from clip_data.opened import REMARK, Opened, Record
from clip_data.readers import FileReader, read_inside
from clip_data.tables import json_object

_BESIDE = (".txt", ".json")


def open_folder(folder: UPath) -> Opened:
    """Captions beside the images (KEY.txt, KEY.json with a caption), else a folder per class.

    Raises:
        DataError: it is neither.
    """
    root = folder.resolve() if isinstance(folder, Path) else folder
    if any(beside for _, beside, _ in _walk(root)):
        records = partial(_captioned, root)
        first = next((record for record in records() if isinstance(record, dict)), {})
        columns = [name for name in {"image": 0, "caption": 0, **first} if name != REMARK]
    elif any("/" in image for image, _, _ in _walk(root)):
        records, columns = partial(_classes, root), ["image", "class"]
    else:
        raise DataError(
            f"{folder}: no images ({', '.join(images.SUFFIXES)}) with captions beside them "
            "(KEY.txt, or KEY.json with a caption), nor folders of images, one per class"
        )
    return Opened(FileReader(root), records, columns, "image")


def _walk(root: UPath) -> Iterator[tuple[str, list[str], str | None]]:
    """(path of an image, suffixes of the caption files beside it, remark), by folder and name."""
    for folder, names in _folders(root):
        known = set(names)
        first_of: dict[str, str] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in images.SUFFIXES:
                continue
            twin = first_of.setdefault(name.lower(), name)
            remark = None if twin == name else f"name differs only in case from {twin}"
            beside = [extension for extension in _BESIDE if stem + extension in known]
            yield os.path.join(folder, name), beside, remark


def _folders(root: UPath) -> Iterator[tuple[str, list[str]]]:
    """(a folder's path within root, its files' names), sorted."""
    start, walk = str(root), cast(Any, os.walk if isinstance(root, Path) else root.fs.walk)
    if not isinstance(root, Path):
        start = root.path
    for folder, folders, files in walk(start):
        if isinstance(folders, list):
            folders.sort()  # os.walk goes on in this order
        inside = os.path.relpath(folder, start)
        yield ("" if inside == "." else inside), sorted(files)


def _captioned(root: UPath) -> Iterator[Record]:
    for image, beside, remark in _walk(root):
        stem = os.path.splitext(image)[0]
        try:
            record: dict[str, Any] = {}
            if ".json" in beside:
                record = json_object(read_inside(root, stem + ".json"))
            if ".txt" in beside:
                text = read_inside(root, stem + ".txt").decode("utf-8-sig", "surrogateescape")
                record["caption"] = text.splitlines()
            yield {**record, "image": image, REMARK: remark}
        except RowError as error:
            yield RowError(error.reason, image)


def _classes(root: UPath) -> Iterator[Record]:
    for image, _, remark in _walk(root):
        first, separator, _ = image.partition("/")
        yield {"image": image, "class": first if separator else None, REMARK: remark}
