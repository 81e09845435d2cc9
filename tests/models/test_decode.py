"""Every kind of image file has the outcome that decode.py promises, PIL being the oracle."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from clip_models import ImageError, decode_image
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
WIDTH, HEIGHT = 45, 34


def smooth(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    coarse = np.random.default_rng(7).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or smooth()).save(buffer, kind, **options)
    return buffer.getvalue()


def png(samples: NDArray[Any], colour: int) -> bytes:
    """A PNG of 16 bits, which PIL cannot write in colour; samples [H, W, C], colour its type."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def pil(data: bytes) -> Pixels:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe segment calls it YCCK."""
    data = bytearray(file("JPEG", smooth().convert("CMYK")))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def turned(image: Image.Image) -> list[Image.Image]:
    return [image.rotate(90, expand=True)]


AS_PIL: dict[str, Callable[[], bytes]] = {
    "4:2:0": lambda: file("JPEG", subsampling="4:2:0"),
    "4:2:2": lambda: file("JPEG", subsampling="4:2:2"),
    "4:4:4": lambda: file("JPEG", subsampling="4:4:4"),
    "low quality": lambda: file("JPEG", quality=5),
    "RGB JPEG": lambda: file("JPEG", keep_rgb=True),
    "grey JPEG": lambda: file("JPEG", smooth().convert("L")),
    "progressive": lambda: file("JPEG", progressive=True),
    "restart markers": lambda: file("JPEG", restart_marker_rows=1),
    "CMYK JPEG": lambda: file("JPEG", smooth().convert("CMYK")),
    "YCCK JPEG": ycck,
    "ICC profile": lambda: file("JPEG", icc_profile=b"\xff\xda\xff\xe1" * 40),
    "MPO": lambda: file("MPO", save_all=True, append_images=turned(smooth())),
    "bytes after the end": lambda: file("JPEG") + b"\xff\xd8\xffmore" * 9,
    "stray bytes inside": lambda: file("JPEG").replace(b"\xff\xdb", b"\0\0\xff\xdb", 1),
    "no padding before a segment": lambda: file("JPEG").replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
    "RGB": lambda: file("PNG"),
    "RGBA": lambda: file("PNG", smooth().convert("RGBA").rotate(30)),
    "LA": lambda: file("PNG", smooth().convert("LA").rotate(30)),
    "grey": lambda: file("PNG", smooth().convert("L")),
    "1 bit": lambda: file("PNG", smooth().convert("1")),
    "palette": lambda: file("PNG", smooth().quantize(16)),
    "transparent palette": lambda: file("PNG", smooth().quantize(16), transparency=bytes([0, 9])),
    "animated GIF": lambda: file("GIF", save_all=True, append_images=turned(smooth())),
    "animated PNG": lambda: file("PNG", save_all=True, append_images=[smooth().rotate(9)]),
    "animated WebP": lambda: file("WEBP", save_all=True, append_images=[smooth().rotate(9)]),
    "BMP": lambda: file("BMP"),
    "TIFF": lambda: file("TIFF", compression="tiff_lzw"),
    "float TIFF": lambda: file("TIFF", smooth().convert("F")),
}


@pytest.mark.parametrize("make", AS_PIL.values(), ids=AS_PIL)
def test_pixels_are_pils(make: Callable[[], bytes], capfd: pytest.CaptureFixture[str]) -> None:
    data = make()
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, pil(data))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_stand_upright(kind: str, orientation: int) -> None:
    data = file(kind, exif=oriented(orientation))
    with Image.open(io.BytesIO(data)) as image:
        upright = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape[:2] == (
        (WIDTH, HEIGHT) if orientation in (5, 6, 7, 8) else (HEIGHT, WIDTH)
    )
    np.testing.assert_array_equal(decode_image(data), upright)


def test_orientation_in_xmp_counts_as_well() -> None:
    data = file("JPEG", xmp=b'<x:xmpmeta><r tiff:Orientation="6"/></x:xmpmeta>')
    np.testing.assert_array_equal(decode_image(data), np.rot90(pil(data), -1))


def test_a_broken_exif_block_costs_nothing() -> None:
    data = file("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(data), pil(data))


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_become_the_high_8(colour: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    samples = np.random.default_rng(colour).integers(0, 65536, (9, 7, channels))
    shown = samples[..., :3] if channels > 2 else np.repeat(samples[..., :1], 3, axis=2)
    np.testing.assert_array_equal(decode_image(png(samples, colour)), shown >> 8)


def test_transparent_palettes_keep_their_colours() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert decode_image(file("PNG", image, transparency=bytes([0, 10])))[0, 0].tolist() == [
        0,
        0,
        255,
    ]


CUT = {
    "baseline": {},
    "progressive": {"progressive": True},
    "with EXIF": {"exif": oriented(6)},
    "restart markers": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("options", CUT.values(), ids=CUT)
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"], ids=["cut", "cut, with an end marker"])
def test_no_picture_is_half_grey(
    options: dict[str, Any], end: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    data = file("JPEG", smooth(200, 200), **options)
    for length in (2, 20, 300, len(data) // 2, len(data) - 100):
        with pytest.raises(ImageError, match="not a readable image"):
            decode_image(data[:length] + end)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_other_cut_files_are_refused(kind: str) -> None:
    data = file(kind, smooth(100, 100))
    with pytest.raises(ImageError, match="not a readable image"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>no image</html>"])
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"not a readable image \([0-9]+ bytes\): no known"):
        decode_image(data)


@pytest.mark.parametrize("options", [{}, {"exif": oriented(1)}], ids=["plain", "with EXIF"])
@pytest.mark.parametrize("side", [20_000, 60_000])
def test_a_jpeg_bomb_is_refused_by_its_header(side: int, options: dict[str, Any]) -> None:
    data = bytearray(file("JPEG", **options))
    size = data.rindex(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", side, side)
    with pytest.raises(ImageError, match="100,000,000"):
        decode_image(bytes(data))


def test_a_png_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(ImageError, match="20000 x 6000 pixels; the limit is 100,000,000"):
        decode_image(file("PNG", Image.new("1", (20_000, 6_000))))


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(ImageError):
        decode_image(png(np.zeros((0, 5, 3)), 2))
    data = bytearray(file("JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 2] = b"\0\0"
    with pytest.raises(ImageError):
        decode_image(bytes(data))


def test_eps_is_refused_before_ghostscript_sees_it() -> None:
    with pytest.raises(ImageError, match="Ghostscript"):
        decode_image(file("EPS"))


WHOLE = [file(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")] + [
    file("JPEG", exif=oriented(6)),
    file("PNG", exif=oriented(6)),
    file("JPEG", progressive=True),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5),
    st.integers(1, 4000),
)
def test_damage_gives_pixels_or_one_line(
    data: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(data[:length])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    message = ""
    try:
        pixels = decode_image(bytes(damaged))
    except ImageError as error:
        message = str(error)
    else:
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8
    assert "\n" not in message
