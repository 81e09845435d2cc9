"""One sample: an image, its captions, its label. From a source's row to the members of a shard."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clip_data.errors import RowError
from clip_data.images import ImageOptions, prepare_image


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, its image not read yet. Good or bad, it has its place in a shard."""

    image: str
    """Path in the source's folder, URL, or name; of an unreadable row, where it stands."""
    captions: tuple[str, ...] | None = None
    """None: the source has no captions."""
    label: str | None = None
    """Class name. None: the source has no labels."""
    extra: Mapping[str, Any] | None = None
    """The source's other columns."""
    fault: str | None = None
    """Why the row is bad, where that can be told without its image."""
    place: tuple[Any, ...] = ()
    """Where the source's reader finds the image, if its name does not tell. Of JSON."""
    remark: str | None = None
    """What is odd about the row, though it is good."""

    @property
    def fields(self) -> tuple[Any, ...]:
        """All of it, in the order of its arguments."""
        return (
            self.image,
            self.captions,
            self.label,
            self.extra,
            self.fault,
            self.place,
            self.remark,
        )


@dataclass(frozen=True)
class Sample:
    """A good row: the bytes of its members by extension, in the order of the tar."""

    members: dict[str, bytes]
    width: int
    height: int


def make_sample(
    row: Row,
    key: str,
    read: Callable[[], bytes],
    options: ImageOptions,
    classes: Mapping[str, int] | None,
) -> Sample:
    """Read and check the row's image, and encode the members .jpg/.png/.webp, .txt, .json, .cls.

    Args:
        read: gives the encoded image.
        classes: the number of each class name; None where the source has no labels.

    Raises:
        RowError: the row cannot become a sample.
    """
    if classes is not None and row.label not in classes:
        raise RowError("label not in classnames", repr(row.label))
    picture = prepare_image(read(), options)
    members = {picture.extension: picture.data}
    if row.captions is not None:
        members["txt"] = "\n".join(row.captions).encode()
    about = {"key": key, "image": row.image, "width": picture.width, "height": picture.height}
    members["json"] = json.dumps({**(row.extra or {}), **about}, default=str).encode()
    if classes is not None and row.label is not None:
        members["cls"] = str(classes[row.label]).encode()
    return Sample(members, picture.width, picture.height)
