"""Bytes of an image file -> the bytes to store. Every input has one of these outcomes:

    JPEG, PNG, WebP          its own bytes, once they have been decoded; EXIF, profiles and all
    MPO                      a JPEG: decoders read its first frame
    GIF, BMP, TIFF, AVIF, …  a PNG of the first frame; EPS is refused (a program, not pixels)
    animated PNG or WebP     its own bytes; re-encoded, the first frame
    damage inside a JPEG     concealed by libjpeg, as in Pillow, if the picture is complete
    cut short, also where    "corrupt image": never a picture that is half grey
      an end marker follows
    bytes after the end      ignored
    no image                 "not an image"
    over `max_pixels`        "too many pixels", from the header, before anything is decoded
    a side below a minimum   "too small"; beyond `max_aspect_ratio`: "too long and narrow"

What `ImageOptions` says is resized, or is not yet of the format asked for, is encoded anew:

    EXIF orientation         applied to the pixels; no other metadata and no colour profile is kept
    alpha: RGBA, LA          kept by PNG and WebP, resized as a channel like any other, so that the
                             colours below stay as they are; dropped by JPEG
    palette                  its colours, with their alpha
    CMYK, YCCK, others       Pillow's conversion to RGB, without colour management
    16 bits, grey or colour  the high byte; a PNG that is only another file's copy keeps 16-bit grey
    32 bits and float        clipped to 0-255, as Pillow does
    1 bit, grey              grey

Clip-models decodes whatever is accepted here up to its own 100 million pixels. The same bytes give
the same bytes, in any thread.
"""

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from clip_data.errors import DataError, RowError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

RESIZE_MODES = ("shortest", "longest", "crop", "pad")
LONGEST = {"jpg": 65_500, "png": 2**31 - 1, "webp": 16_383}
"""The formats that are written, and the pixels a side of each may have."""

# All formats at once: while one thread loads them, `Image.open` of another would miss some.
Image.init()
# Remarks on harmless metadata. `catch_warnings` is not for threads: the filter is the process's.
warnings.filterwarnings("ignore", module=r"PIL\.")

_JPEG = ("JPEG", "MPO")
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|....ftypavi", re.DOTALL)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageOptions:
    """What becomes of an image. The defaults keep its bytes, whatever its size."""

    min_image_size: int = 1
    """Of the shorter side, in pixels; a smaller image makes a bad row."""
    max_aspect_ratio: float | None = None
    """Of the longer to the shorter side; a longer image makes a bad row."""
    max_pixels: int = 100_000_000
    """Width x height, told from the header; a larger image makes a bad row. Pillow's own
    limit is 178,956,970."""
    image_size: int | None = None
    """What to resize to, in pixels; None: not at all."""
    resize_mode: str = "shortest"
    """The side that becomes image_size: "shortest" or "longest"; "crop" to the square in the
    middle, or "pad" with white to a square."""
    upscale: bool = False
    """Whether images with a smaller side than that are enlarged; else they are kept as they are,
    not cropped and not padded either."""
    encode: str | None = None
    """The format of every image, "jpg", "png" or "webp": one that has it and needs no resizing
    keeps its bytes. None: all keep theirs, resized or not; others than these three become PNG."""
    quality: int = 95
    """Of JPEG and WebP, 1 to 100."""

    def __post_init__(self) -> None:
        if self.resize_mode not in RESIZE_MODES:
            raise DataError(f"resize_mode {self.resize_mode!r}: expected one of {RESIZE_MODES}")
        if self.encode is not None and self.encode not in LONGEST:
            raise DataError(f"encode {self.encode!r}: expected one of {tuple(LONGEST)}")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality {self.quality}: expected 1 to 100")
        if self.image_size is not None and not 1 <= self.image_size <= LONGEST["webp"]:
            raise DataError(f"image_size {self.image_size}: expected 1 to {LONGEST['webp']}")


@dataclass(frozen=True)
class Picture:
    """An image that decodes: the bytes to store, the extension of their format, their pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def prepare_image(data: bytes, options: ImageOptions) -> Picture:
    """Decode the whole image and see what is to be stored of it. For any number of threads.

    Raises:
        RowError: it is no image, a damaged one, or outside the limits of `options`.
    """
    try:
        image = Image.open(io.BytesIO(data))  # reads the header only
        width, height = image.size
        _check_size(image, options)
        size = _new_size(width, height, options)
        kept = _KEPT.get(image.format or "")
        extension = options.encode or kept or "png"
        if kept == extension and size is None:
            _check_pixels(data, image)
            return Picture(data, extension, width, height)
        if max(size or (width, height)) > LONGEST[extension]:
            raise RowError("too many pixels", f"{width} x {height}, a side too long for the format")
        pixels = _decode(data, image, size, copy=extension == "png" and kept is None)
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("too many pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        reason = "corrupt image" if _MAGIC.match(data) else "not an image"
        raise RowError(reason, f"{len(data)} bytes of no known image format") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
        detail = " ".join(str(error).split()) or type(error).__name__
        raise RowError("corrupt image", detail) from error
    if extension == "jpg" and pixels.mode in ("LA", "RGBA"):
        pixels = pixels.convert(pixels.mode[:-1])
    if size is not None:
        pixels = _resize(pixels, size, crop=options.resize_mode == "crop")
    pixels = _upright(pixels, image)
    if size is not None and options.resize_mode == "pad":
        pixels = _pad(pixels)
    stored = _encode(pixels, extension, options.quality)
    return Picture(stored, extension, pixels.width, pixels.height)


def _check_size(image: Image.Image, options: ImageOptions) -> None:
    width, height = image.size
    if image.format == "EPS":
        raise RowError("not an image", "EPS is a program; make it a PNG")
    if width * height > options.max_pixels:
        detail = f"{width} x {height}; the limit is {options.max_pixels:,} in all"
        raise RowError("too many pixels", detail)
    if min(width, height) < options.min_image_size:
        detail = f"{width} x {height}; the shorter side must have {options.min_image_size}"
        raise RowError("too small", detail)
    ratio = options.max_aspect_ratio
    if ratio is not None and max(width, height) > ratio * min(width, height):
        raise RowError("too long and narrow", f"{width} x {height}; the limit is {ratio:g} to 1")


def _new_size(width: int, height: int, options: ImageOptions) -> tuple[int, int] | None:
    """What the picture is scaled to, before any border; None: it stays as it is.

    As img2dataset does, but for a picture whose shorter (longer) side is right already and that
    is to be a square: that one is cropped (padded).
    """
    side, mode = options.image_size, options.resize_mode
    if side is None:
        return None
    base = min(width, height) if mode in ("shortest", "crop") else max(width, height)
    done = base == side and (width == height or mode in ("shortest", "longest"))
    if done or (base < side and not options.upscale):
        return None
    if mode == "crop":
        return side, side
    new_width, new_height = ((edge * side + base // 2) // base or 1 for edge in (width, height))
    if new_width * new_height > options.max_pixels:
        detail = f"{width} x {height} would become {new_width} x {new_height}"
        raise RowError("too many pixels", detail)
    return new_width, new_height


def _check_pixels(data: bytes, image: Image.Image) -> None:
    """Decode all that is encoded, which needs not all of a JPEG's pixels: 1 of 64 will do."""
    if image.format in _JPEG:
        try:
            simplejpeg.decode_jpeg(data, "GRAY", True, True, min_height=1, min_width=1)
            return
        except ValueError as error:  # any of libjpeg's warnings, too
            if "remature end" in str(error):  # of the file, or of the data before the end marker
                raise
    image.load()


def _decode(
    data: bytes, image: Image.Image, size: tuple[int, int] | None, copy: bool
) -> Image.Image:
    """The pixels as L, LA, RGB or RGBA, no smaller than 2 x `size` where the file has as many.

    A `copy` has any mode that PNG can have.
    """
    if image.format in _JPEG:
        if image.mode in ("L", "RGB"):
            try:
                return _decode_jpeg(data, image, size)
            except ValueError as error:  # see _check_pixels
                if "remature end" in str(error):
                    raise
        else:
            _check_pixels(data, image)
    image.load()
    if copy and size is None and image.mode in _PNG_MODES:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode in ("1", "I", "F"):
        return image.convert("L")
    alpha = image.mode in ("PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if alpha else "RGB")


def _decode_jpeg(data: bytes, image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """By libjpeg's cosines, to 1/2, 1/4 or 1/8 if that is still twice the size."""
    width, height = image.size
    scale = 8 if size is not None else 1
    while size is not None and scale > 1 and min(width, height) < 2 * scale * min(size):
        scale //= 2
    pixels = simplejpeg.decode_jpeg(
        data,
        "GRAY" if image.mode == "L" else "RGB",
        min_height=-(-height // scale),
        min_width=-(-width // scale),
    )
    return Image.fromarray(pixels[:, :, 0] if image.mode == "L" else pixels)


def _resize(image: Image.Image, size: tuple[int, int], crop: bool) -> Image.Image:
    """Lanczos where the picture grows, as img2dataset. Else Hamming, of Pillow's filters the one
    nearest to img2dataset's areas: within 0.4 levels in the mean, of a photograph."""
    width, height = image.size
    left, top = max(0, width - height) / 2 * crop, max(0, height - width) / 2 * crop
    box = (left, top, width - left, height - top)
    how = Image.Resampling.HAMMING if size[0] < box[2] - left else Image.Resampling.LANCZOS
    if image.mode in ("LA", "RGBA"):  # of itself, Pillow would blacken what is transparent
        bands = [band.resize(size, how, box) for band in image.split()]
        return Image.merge(image.mode, bands)
    resized = image.resize(size, how, box)
    resized.info.pop("transparency", None)  # one colour, which mixed with its neighbours
    return resized


def _pad(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new(image.mode, (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """As Pillow's `exif_transpose`, by the orientation of `image`."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN_EXIF:  # is no reason to lose the picture
        return pixels
    return pixels if turn is None else pixels.transpose(turn)


def _encode(image: Image.Image, extension: str, quality: int) -> bytes:
    if extension == "jpg":
        grey = image.mode == "L"
        pixels = np.atleast_3d(np.asarray(image))
        colours, chroma = ("GRAY", "Gray") if grey else ("RGB", "420")
        return simplejpeg.encode_jpeg(pixels, quality, colours, chroma)
    buffer = io.BytesIO()
    if extension == "png":
        image.save(buffer, "PNG", icc_profile=None)
    else:
        image.save(buffer, "WEBP", quality=quality, exact=True)
    return buffer.getvalue()
