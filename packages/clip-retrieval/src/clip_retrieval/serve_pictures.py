"""Pictures on their way to the page: their type, and small ones."""

import io

from PIL import Image, ImageOps

from clip_retrieval.search import Index

SIDE = 400  # pixels of a thumbnail's longer side: a tile of the page on a sharp screen
_SMALL = 64 << 10  # bytes; a picture that is no larger and fits is sent as it is

_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
}


def media_type(data: bytes) -> str:
    """By the first bytes; what is no picture of the web's own formats is for no browser to show."""
    found = (kind for start, kind in _TYPES.items() if data.startswith(start))
    return next(found, "application/octet-stream")


def thumbnail(index: Index, row: int) -> bytes:
    """A row's picture with a longer side of at most SIDE, upright; the index's own if it has one.

    Raises:
        RetrievalError: there is neither a thumbnail nor a picture.
        OSError: bytes that are no picture.
    """
    kept = index.thumbnail(row)
    return shrink(index.image(row)) if kept is None else kept


def shrink(data: bytes) -> bytes:
    """An encoded picture in WebP, or as it is where it is small.

    Raises:
        OSError: bytes that are no picture.
    """
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= SIDE and len(data) <= _SMALL:
            return data
        image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at an eighth of its size or so
        upright = ImageOps.exif_transpose(image)
        upright.thumbnail((SIDE, SIDE))
        mode = "RGBA" if upright.has_transparency_data else "RGB"
        file = io.BytesIO()
        upright.convert(mode).save(file, "WEBP", quality=82, method=2)
        return file.getvalue()
