"""Pictures come out as they were, upright, on white."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from PIL import Image, ImageOps

from tests.support.decoding import RED, SIZE, WHITE, _turned, chunk, difference, picture, png
from tests.support.pictures import encoded
from worker.images.decode import open_image

# Formats and modes


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_lossless_picture_comes_out_as_it_was(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert difference(open_image(encoded(picture(), kind, **options)), picture()) == 0


def test_a_jpeg_comes_out_as_pillow_decodes_it() -> None:
    for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}):
        data = encoded(picture(), "JPEG", **options)
        assert difference(open_image(data), Image.open(io.BytesIO(data)).convert("RGB")) == 0


def test_a_gif_comes_out_in_its_colours() -> None:
    few = picture().quantize(16)
    assert difference(open_image(encoded(few, "GIF")), few.convert("RGB")) == 0


def test_a_phones_multi_picture_file_is_a_jpeg() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert difference(open_image(data), Image.open(io.BytesIO(data)).convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("I;16", SIZE, 30_000) if mode == "I;16" else picture().convert(mode)
    opened = open_image(encoded(image, "PNG"))
    assert (opened.mode, opened.size, type(opened)) == ("RGB", SIZE, Image.Image)
    if mode != "I;16":
        assert difference(opened, image.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_jpeg_mode_becomes_rgb(mode: str) -> None:
    opened = open_image(encoded(Image.new("RGB", SIZE, (200, 200, 200)).convert(mode), "JPEG"))
    assert opened.mode == "RGB"
    assert difference(opened, Image.new("RGB", SIZE, (200, 200, 200))) <= 3


def test_cmyk_is_not_inverted() -> None:
    opened = open_image(encoded(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "JPEG", quality=95))
    assert difference(opened, Image.new("RGB", SIZE, RED)) <= 6


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (30_000, 117), (65_535, 255), (256, 1)])
def test_sixteen_bits_are_scaled_and_not_clipped(value: int, expected: int) -> None:
    opened = open_image(encoded(Image.new("I;16", SIZE, value), "PNG"))
    assert opened.getpixel((0, 0)) == (expected,) * 3


def test_sixteen_bits_with_a_clear_value_are_white_there() -> None:
    rows = b"".join(b"\0" + struct.pack(">HH", 1_000, 40_000) for _ in range(2))
    opened = open_image(png(2, 2, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1_000))))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (156, 156, 156)]


def test_sixteen_bits_a_channel_are_read() -> None:
    rows = b"\0" + struct.pack(">HHH", 65_535, 0, 32_896)
    assert open_image(png(1, 1, 16, 2, rows)).getpixel((0, 0)) == (255, 0, 128)


# Transparency


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (255, RED), (128, (255, 127, 127))])
def test_transparency_shows_white(kind: str, alpha: int, expected: tuple[int, int, int]) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(Image.new("RGBA", SIZE, (*RED, alpha)), kind, **options)
    assert open_image(data).getpixel((5, 5)) == expected


def test_alpha_is_composited_exactly_as_the_stock_processor_does() -> None:
    image = picture()
    image.putalpha(Image.radial_gradient("L").resize(SIZE))
    white = Image.new("RGBA", SIZE, WHITE)
    expected = Image.alpha_composite(white, image).convert("RGB")
    assert difference(open_image(encoded(image, "PNG")), expected) == 0


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_clear_colour_shows_white(kind: str) -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 10, 10))
    opened = open_image(encoded(image, kind, transparency=0))
    assert [opened.getpixel(at) for at in ((5, 5), (20, 20))] == [WHITE, RED]


def test_a_palette_with_an_alpha_for_each_colour_shows_white() -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, *RED])
    assert open_image(encoded(image, "PNG", transparency=bytes([255, 0]))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "clear"), [("1", 0, 0), ("L", 7, 7), ("RGB", RED, RED), ("LA", (9, 0), None)]
)
def test_a_clear_value_shows_white(mode: str, colour: Any, clear: Any) -> None:
    options = {} if clear is None else {"transparency": clear}
    assert open_image(encoded(Image.new(mode, SIZE, colour), "PNG", **options)).getpixel((0, 0)) == WHITE


# EXIF, profiles, frames


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_set_upright(orientation: int, kind: str) -> None:
    data = encoded(picture(), kind, exif=_turned(orientation))
    with Image.open(io.BytesIO(data)) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    opened = open_image(data)
    assert difference(opened, expected) == 0
    assert opened.size == (SIZE if orientation not in (5, 6, 7, 8) else SIZE[::-1])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_does_not_cost_the_picture(exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert open_image(encoded(picture(), kind, exif=exif)).size == SIZE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_neither_exif_nor_profile_nor_comment_is_handed_on(kind: str) -> None:
    options = {"exif": _turned(6), "icc_profile": b"profile" * 30, "comment": b"hello", "dpi": (300, 300)}
    for image in (picture(), picture().convert("L")):
        opened = open_image(encoded(image, kind, **options))
        assert opened.info == {}
        assert dict(opened.getexif()) == {}
        assert "Exif" not in repr(encoded(opened, "JPEG")[:200])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animations_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as animation:
        assert getattr(animation, "n_frames", 1) == 3
    assert difference(open_image(data), frames[0]) == 0


# Drafts


def test_a_draft_is_smaller_but_never_below_the_target() -> None:
    data = encoded(picture((800, 600)), "JPEG")
    assert open_image(data).size == (800, 600)
    assert open_image(data, target=150).size == (200, 150)
    assert open_image(data, target=224).size == (400, 300)
    assert open_image(data, target=5_000).size == (800, 600)
    assert open_image(encoded(picture(), "PNG"), target=4).size == SIZE
