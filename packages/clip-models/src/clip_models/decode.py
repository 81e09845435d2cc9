"""Bytes of an image file -> upright RGB pixels. Every input has one of these outcomes:

    JPEG, RGB or grey        simplejpeg; the pixels are PIL's, bit for bit (baseline, progressive)
    JPEG, CMYK or YCCK       PIL's conversion, without colour management
    MPO, GIF, WebP, APNG     the first frame
    any other format         PIL: PNG, BMP, TIFF, AVIF, ...; EPS is refused (a program, not pixels)
    EXIF orientation         applied, people see the picture that way (open_clip ignores it)
    alpha: RGBA, LA          dropped, the colours below it are kept, as PIL and open_clip do
    palette                  its colours; transparent entries keep theirs
    1 bit                    black and white
    16 bits, grey or colour  the high byte: PIL clips grey to white, and takes the high byte of RGB
    16-bit PGM, 32-bit and   clipped to 0-255, as PIL does
      float TIFF
    colour profiles          ignored, as open_clip does
    bytes after the end      ignored
    damage inside a JPEG     concealed by libjpeg, as in PIL, if the picture is complete
    cut short, also where    ImageError: never a picture that is half grey
      an end marker follows
    over 100 million pixels  ImageError, from the header, before anything is decoded
    zero size, no image      ImageError

An ImageError is one line. libjpeg's warnings stay off stderr; libtiff's, of a damaged TIFF, do not.
"""

# H, W: height and width in pixels

import io
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

from clip_models.errors import ImageError

MAX_PIXELS = 100_000_000  # a decompression bomb is refused by its header

_PLAIN = ("YCbCr", "RGB", "Gray")  # libjpeg's conversions to RGB; CMYK and YCCK are PIL's
_APP1, _SCAN = 0xE1, 0xDA  # markers of a JPEG

# EXIF orientation: (swap rows and columns, then reverse rows, then reverse columns)
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """An encoded image -> uint8 [H, W, 3], as this module's table says.

    Raises:
        ImageError: the bytes are no complete image, or one above 100 million pixels.
    """
    pixels_HW3 = _plain_jpeg(data)
    return _by_pil(data) if pixels_HW3 is None else pixels_HW3


def check_size(width: int, height: int, what: str = "image") -> None:
    """Raises ImageError for no pixels or for more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise ImageError(f"{what} of {width} x {height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{what} of {width} x {height} pixels; the limit is {MAX_PIXELS:,} in all")


def _plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """The common case; `open` of PIL would add 3% to the time of all of `Preprocess.eval`."""
    if not data.startswith(b"\xff\xd8\xff") or _has_metadata(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_size(int(width), int(height))
        return simplejpeg.decode_jpeg(data) if colours in _PLAIN else None
    except ImageError:
        raise
    except ValueError:  # any of libjpeg's warnings, too
        return None


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG has an APP1 segment, EXIF or XMP, before its first scan, or is unusual."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker = data[place + 1]
        if marker in (_APP1, _SCAN):
            return marker == _APP1
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return True


def _by_pil(data: bytes) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks about harmless metadata
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                check_size(image.width, image.height)
                if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                    pixels_HW3 = _jpeg(data, image)
                else:
                    pixels_HW3 = _convert(image)
                return _upright(pixels_HW3, image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"above the limit of {MAX_PIXELS:,} pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        reason = "no known image format"
        raise ImageError(f"not a readable image ({len(data):,} bytes): {reason}") from error
    except Exception as error:  # PIL's decoders raise nearly anything on broken bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"not a readable image ({len(data):,} bytes): {reason}") from error


def _jpeg(data: bytes, image: Image.Image) -> NDArray[np.uint8]:
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError as error:  # any of libjpeg's warnings, too
        if "remature end" in str(error):  # of the file, or of the data before the end marker
            raise
        return _convert(image)  # PIL accepts, as libjpeg does, what can be concealed


def _convert(image: Image.Image) -> NDArray[np.uint8]:
    if image.format == "EPS":
        raise ImageError("EPS: PIL would run Ghostscript on it; make it a PNG")
    if image.mode.startswith("I;16"):
        grey_HW = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _upright(pixels_HW3: NDArray[np.uint8], image: Image.Image) -> NDArray[np.uint8]:
    """As PIL's `exif_transpose`, on an array."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN_EXIF:  # is no reason to lose the picture
        return pixels_HW3
    if turn is None:
        return pixels_HW3
    swap, rows, columns = turn
    turned = pixels_HW3.swapaxes(0, 1) if swap else pixels_HW3
    return np.ascontiguousarray(turned[:: -1 if rows else 1, :: -1 if columns else 1])
