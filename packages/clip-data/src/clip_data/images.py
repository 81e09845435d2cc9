"""An encoded image, decoded once to see that it can be; its own bytes are what is kept."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

from PIL import Image

from clip_data.errors import RowError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

# MPO is a JPEG with further frames after it: every JPEG decoder reads the first.
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

# What Pillow's decoders are known to raise on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class ImageOptions:
    """What becomes of an image. The defaults keep its bytes, whatever its size."""

    min_image_size: int = 1
    """Of the shorter side, in pixels; a smaller image makes a bad row."""
    max_aspect_ratio: float | None = None
    """Of the longer to the shorter side; a longer image makes a bad row."""
    max_pixels: int = 100_000_000
    """Width x height, told from the header; a larger image makes a bad row."""
    image_size: int | None = None
    """What to resize to, in pixels; None: not at all."""
    resize_mode: str = "shortest"
    """The side that becomes image_size: "shortest" or "longest"; "crop" to, or "pad" to a square."""
    upscale: bool = False
    """Whether smaller images are enlarged; else they are kept as they are."""
    encode: str | None = None
    """"jpg", "png" or "webp"; None keeps the bytes, and the format of what is resized."""
    quality: int = 95
    """Of JPEG and WebP."""


@dataclass(frozen=True)
class Picture:
    """An image that decodes: the bytes to store, the extension of their format, its pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def check_image(data: bytes) -> Picture:
    """Decode the whole image; keep its bytes if they are JPEG, PNG or WebP, else make them PNG.

    Raises:
        RowError: it is no image, a damaged one, or one of more pixels than Pillow thinks safe
            (`PIL.Image.MAX_IMAGE_PIXELS`, told from the header before anything is decoded).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about harmless metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _stored(data, image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RowError("too many pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise RowError("not an image", f"{len(data)} bytes of no known image format") from error
    except _DAMAGED as error:
        raise RowError("corrupt image", str(error)) from error


def prepare_image(data: bytes, options: ImageOptions) -> Picture:
    return check_image(data)


def _stored(data: bytes, image: Image.Image) -> Picture:
    extension = _KEPT.get(image.format or "")
    if extension is None:
        extension, buffer = "png", io.BytesIO()
        still = image if image.mode in _PNG_MODES else image.convert("RGB")
        still.save(buffer, "PNG")
        data = buffer.getvalue()
    return Picture(data, extension, image.width, image.height)
