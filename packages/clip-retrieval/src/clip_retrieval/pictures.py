"""Pictures for people: their type, and small ones."""

import io

from clip_models import decode_image
from PIL import Image

_SIDE = 400  # pixels of a tile of the page on a sharp screen
_SMALL = 64 << 10  # bytes; a picture that is no larger and fits is sent as it is
_TRANSPARENT = ("LA", "P", "PA", "RGBA")  # modes that may be

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


def thumbnail(data: bytes, side: int) -> bytes:
    """A picture, as the model sees it, as a JPEG whose longer side has at most `side` pixels.

    Raises:
        ImageError: bytes that are no readable image.
    """
    return _shrink(Image.fromarray(decode_image(data)), side, "JPEG")


def tile(data: bytes) -> bytes:
    """A picture for the page: as it is where it is small, else a WebP, transparent where it was.

    Raises:
        ImageError: bytes that are no readable image.
    """
    image = Image.fromarray(decode_image(data))
    if max(image.size) <= _SIDE and len(data) <= _SMALL:
        return data
    with Image.open(io.BytesIO(data)) as stored:
        if stored.mode in _TRANSPARENT and stored.size == image.size:  # not turned by its EXIF
            image.putalpha(stored.convert("RGBA").getchannel("A"))
    return _shrink(image, _SIDE, "WEBP")


def _shrink(image: Image.Image, side: int, kind: str) -> bytes:
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, kind, quality=80, method=2)  # the method is WebP's: fast
    return file.getvalue()
