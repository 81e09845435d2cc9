"""Every kind of image file has the outcome that images.py promises, and clip-models agrees."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from clip_data.errors import DataError, RowError
from clip_data.images import ImageOptions, prepare_image
from clip_models import ImageError, decode_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

WIDTH, HEIGHT = 45, 34
KEEP = ImageOptions()


def smooth(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    coarse = np.random.default_rng(7).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or smooth()).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def outcome(data: bytes, options: ImageOptions = KEEP) -> str:
    """The reason for which the image is refused, or "accepted"."""
    try:
        prepare_image(data, options)
    except RowError as error:
        return error.reason
    return "accepted"


def distance(first: Image.Image, second: Image.Image) -> float:
    assert first.size == second.size
    pair = (np.asarray(image.convert("RGB"), float) for image in (first, second))
    return float(np.abs(next(pair) - next(pair)).mean())


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [smooth().rotate(90)]}


KEPT: dict[str, tuple[str, bytes]] = {
    "JPEG": ("jpg", file("JPEG")),
    "grey JPEG": ("jpg", file("JPEG", smooth().convert("L"))),
    "RGB JPEG": ("jpg", file("JPEG", keep_rgb=True)),
    "CMYK JPEG": ("jpg", file("JPEG", smooth().convert("CMYK"))),
    "progressive": ("jpg", file("JPEG", progressive=True)),
    "MPO": ("jpg", file("MPO", **frames())),
    "rotated": ("jpg", file("JPEG", exif=oriented(6))),
    "broken EXIF": ("jpg", file("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "bytes after the end": ("jpg", file("JPEG") + b"\xff\xd8\xffmore"),
    "stray bytes inside": ("jpg", file("JPEG").replace(b"\xff\xdb", b"\0\0\xff\xdb", 1)),
    "PNG": ("png", file("PNG", smooth().convert("RGBA"))),
    "16-bit PNG": ("png", file("PNG", Image.new("I;16", (9, 7), 777))),
    "palette PNG": ("png", file("PNG", smooth().quantize(16))),
    "animated PNG": ("png", file("PNG", **frames())),
    "WebP": ("webp", file("WEBP")),
    "animated WebP": ("webp", file("WEBP", **frames())),
}


@pytest.mark.parametrize(("extension", "data"), KEPT.values(), ids=KEPT)
def test_bytes_are_kept(extension: str, data: bytes) -> None:
    picture = prepare_image(data, KEEP)
    assert picture.data == data
    assert picture.extension == extension
    assert (picture.width, picture.height) == opened(data).size
    decode_image(data)
    assert prepare_image(data, replace(KEEP, encode=extension)).data == data


COPIED: dict[str, bytes] = {
    "GIF": file("GIF", smooth().quantize(16)),
    "animated GIF": file("GIF", **frames()),
    "BMP": file("BMP"),
    "AVIF": file("AVIF"),
} | {
    f"TIFF {mode}": file("TIFF", smooth().convert("L").convert(mode))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
}


@pytest.mark.parametrize("data", COPIED.values(), ids=COPIED)
def test_other_formats_become_png_of_the_same_pixels(data: bytes) -> None:
    picture = prepare_image(data, KEEP)
    assert picture.extension == opened(picture.data).format.lower() == "png"
    np.testing.assert_array_equal(decode_image(picture.data), decode_image(data))


@pytest.mark.parametrize("encode", ["jpg", "png", "webp"])
@pytest.mark.parametrize("size", [None, 17])
@pytest.mark.parametrize("name", [*KEPT, *COPIED])
def test_what_is_encoded_anew_looks_the_same(name: str, size: int | None, encode: str) -> None:
    data = COPIED[name] if name in COPIED else KEPT[name][1]
    picture = prepare_image(data, ImageOptions(encode=encode, image_size=size, quality=100))
    assert picture.extension == encode
    stored = opened(picture.data)
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[encode]
    assert stored.format == kind or picture.data == data
    assert (picture.width, picture.height) == stored.size
    shown = Image.fromarray(decode_image(data))
    if size is not None and min(shown.size) > size:
        assert min(stored.size) == size
        shown = shown.resize(stored.size, Image.Resampling.HAMMING)
    if encode != "png" and picture.data != data:  # what half the colours and Pillow's encoder cost
        shown = opened(file(kind, shown, quality=100, subsampling="4:2:0"))
    assert distance(Image.fromarray(decode_image(picture.data)), shown) < 4


def test_16_bits_become_the_high_8() -> None:
    data = file("PNG", Image.new("I;16", (9, 7), 0x1234))
    assert opened(prepare_image(data, ImageOptions(image_size=4)).data).getpixel((0, 0)) == 0x12


def test_colours_below_alpha_stay() -> None:
    clear = file("PNG", Image.new("RGBA", (9, 7), (200, 100, 50, 0)))
    for encode in ("jpg", "png", "webp"):
        picture = prepare_image(clear, ImageOptions(image_size=4, encode=encode))
        pixel = decode_image(picture.data)[0, 0]
        assert np.abs(pixel.astype(int) - (200, 100, 50)).max() < 6, encode
        assert opened(picture.data).mode == ("RGB" if encode == "jpg" else "RGBA")


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return file("PNG")[:8] + chunk + file("PNG")[33:]


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(file("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


REFUSED: list[tuple[str, bytes, dict[str, Any]]] = [
    ("not an image", b"", {}),
    ("not an image", b"<html>no image</html>", {}),
    ("not an image", file("EPS"), {}),
    ("corrupt image", png(0, 5), {}),
    ("corrupt image", jpeg(5, 0), {}),
    ("corrupt image", file("PNG")[:-30], {}),
    ("too many pixels", png(20_000, 6_000), {}),
    ("too many pixels", png(100_000, 100_000), {}),
    ("too many pixels", png(100_000, 100_000), {"max_pixels": 10**12}),
    ("too many pixels", jpeg(60_000, 60_000), {}),
    ("too many pixels", file("JPEG"), {"max_pixels": WIDTH * HEIGHT - 1}),
    ("accepted", file("JPEG"), {"max_pixels": WIDTH * HEIGHT}),
    ("too small", file("JPEG"), {"min_image_size": HEIGHT + 1}),
    ("accepted", file("JPEG"), {"min_image_size": HEIGHT}),
    ("too long and narrow", file("PNG", smooth(31, 10)), {"max_aspect_ratio": 3}),
    ("too long and narrow", file("PNG", smooth(10, 31)), {"max_aspect_ratio": 3}),
    ("accepted", file("PNG", smooth(30, 10)), {"max_aspect_ratio": 3}),
    ("too many pixels", file("PNG", smooth(20_000, 2)), {"encode": "webp"}),
    ("too many pixels", file("PNG", smooth(9_000, 1)), {"image_size": 512, "upscale": True}),
]


@pytest.mark.parametrize(("reason", "data", "options"), REFUSED)
def test_refusals_have_their_reasons(reason: str, data: bytes, options: dict[str, Any]) -> None:
    assert outcome(data, ImageOptions(**options)) == reason


CUT = {
    "baseline": file("JPEG", smooth(200, 150)),
    "progressive": file("JPEG", smooth(200, 150), progressive=True),
    "CMYK": file("JPEG", smooth(200, 150).convert("CMYK")),
    "restart markers": file("JPEG", smooth(200, 150), restart_marker_rows=1),
}


@pytest.mark.parametrize("data", CUT.values(), ids=CUT)
@pytest.mark.parametrize("options", [KEEP, ImageOptions(image_size=20)], ids=["kept", "resized"])
def test_no_picture_is_half_grey(
    data: bytes, options: ImageOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    assert outcome(data, options) == "accepted"
    for length in np.linspace(3, len(data) - 12, 30, dtype=int):
        assert outcome(data[:length], options) == "corrupt image", length
        assert outcome(data[:length] + b"\xff\xd9", options) == "corrupt image", length
    assert outcome(data[:-2], options) == "corrupt image"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_other_cut_files_are_refused(kind: str) -> None:
    data = file(kind, smooth(100, 100))
    assert outcome(data[: len(data) // 2]) == "corrupt image"


WHOLE = [data for _, data in KEPT.values()] + [COPIED["GIF"], COPIED["BMP"]]
CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WHOLE), CHANGES, st.integers(1, 4000))
def test_clip_models_decodes_what_is_accepted(
    data: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    """And the other way round, but for a cut JPEG that is not RGB."""
    damaged = bytearray(data[:length])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    data = bytes(damaged)
    accepted = outcome(data) == "accepted"
    if accepted:
        decode_image(prepare_image(data, KEEP).data)
    elif b"Adobe" not in data:
        with pytest.raises(ImageError):
            decode_image(data)
    assert accepted or outcome(data, ImageOptions(encode="png", image_size=7)) != "accepted"


def expected(size: tuple[int, int], mode: str, side: int, upscale: bool) -> tuple[int, int]:
    base = min(size) if mode in ("shortest", "crop") else max(size)
    if base < side and not upscale:
        return size
    if mode in ("crop", "pad"):
        return side, side
    width, height = (max(1, int(edge * side / base + 0.5)) for edge in size)
    return width, height


@pytest.mark.parametrize("mode", ["shortest", "longest", "crop", "pad"])
@pytest.mark.parametrize("upscale", [False, True])
def test_resized_sizes(mode: str, upscale: bool) -> None:
    for size in ((45, 34), (34, 45), (33, 33), (16, 77), (301, 17), (17, 17), (300, 200), (5, 3)):
        for side in (1, 16, 17, 40):
            options = ImageOptions(image_size=side, resize_mode=mode, upscale=upscale)
            data = file("JPEG", smooth(*size))
            picture = prepare_image(data, options)
            want = expected(size, mode, side, upscale)
            assert (picture.width, picture.height) == opened(picture.data).size == want
            assert (picture.data == data) == (want == size)


@pytest.mark.parametrize("scale", [1, 3, 5, 9, 20])
@pytest.mark.parametrize("mode", ["shortest", "crop"])
def test_a_smaller_decode_is_the_same_picture(scale: int, mode: str) -> None:
    image = smooth(65 * scale + 3, 40 * scale + 1)
    data = file("JPEG", image, quality=95, subsampling="4:4:4")
    options = ImageOptions(image_size=40, resize_mode=mode, encode="png")
    got = opened(prepare_image(data, options).data)
    cut = ImageOps.fit(image, (40, 40)) if mode == "crop" else image.resize(got.size)
    assert distance(got, cut) < 2


def test_borders_are_white_and_even() -> None:
    black = file("PNG", Image.new("RGB", (40, 20)))
    options = ImageOptions(image_size=20, resize_mode="pad")
    rows = np.asarray(opened(prepare_image(black, options).data))[:, :, 0]
    assert rows[:, 0].tolist() == [255] * 5 + [0] * 10 + [255] * 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(10))
def test_encoded_pictures_stand_upright(kind: str, orientation: int) -> None:
    data = file(kind, exif=oriented(orientation), quality=100)
    picture = prepare_image(data, ImageOptions(image_size=17, encode="png"))
    stored = opened(picture.data)
    upright = ImageOps.exif_transpose(opened(data))
    assert not stored.getexif()
    assert picture.width == stored.width == (17 if upright.width < upright.height else 23)
    assert distance(stored, upright.resize(stored.size)) < 4


@pytest.mark.parametrize(
    "wrong", [{"resize_mode": "fit"}, {"encode": "gif"}, {"quality": 0}, {"image_size": 0}]
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="expected"):
        ImageOptions(**wrong)


def test_threads_change_nothing() -> None:
    images = [*WHOLE, *COPIED.values(), *CUT.values(), *(data for _, data, _ in REFUSED)]
    images += [data[: len(data) // 2] for data in images]
    options = [KEEP, ImageOptions(image_size=20, encode="webp"), ImageOptions(image_size=9)]

    def result(data: bytes, how: ImageOptions) -> Any:
        try:
            return prepare_image(data, how)
        except RowError as error:
            return error.args

    jobs = [(data, how) for how in options for data in images]
    alone = [result(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(lambda job: result(*job), jobs)) == alone
