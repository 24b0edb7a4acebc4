"""Threats to the opening of images, and the pictures that must come out right. All files are made here."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError, features

from tasks.errors import ImageInvalid, ImageTooLarge, JobError, OutOfMemory
from tests.support.pictures import encoded
from worker.images.containers import MAX_JUNK, MAX_PARTS
from worker.images.decode import DEFAULT_LIMITS, ImageLimits, open_image

SIZE = (48, 32)
WHITE = (255, 255, 255)
RED = (255, 0, 0)


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    """Four corners of different colours over a gradient: no turn or flip looks like another."""
    width, height = size
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    for corner, colour in ((0, RED), (1, (0, 200, 0)), (2, (0, 0, 255)), (3, (250, 250, 0))):
        left, top = (corner % 2) * (width - width // 3), (corner // 2) * (height - height // 3)
        image.paste(colour, (left, top, left + width // 3, top + height // 3))
    return image


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of any channel of any pixel."""
    assert one.size == other.size
    extrema = ImageChops.difference(one, other).getextrema()
    return max(high for _, high in extrema)  # type: ignore[misc]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of exactly this header; what Pillow would not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


# --- Formats and modes ---


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


# --- Transparency ---


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


# --- EXIF, profiles, frames ---


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


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


# --- Drafts ---


def test_a_draft_is_smaller_but_never_below_the_target() -> None:
    data = encoded(picture((800, 600)), "JPEG")
    assert open_image(data).size == (800, 600)
    assert open_image(data, target=150).size == (200, 150)
    assert open_image(data, target=224).size == (400, 300)
    assert open_image(data, target=5_000).size == (800, 600)
    assert open_image(encoded(picture(), "PNG"), target=4).size == SIZE


# --- Refusals ---


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "BMP", "ICO", "PPM", "TGA", "PDF", "PCX", "SGI", "JPEG2000"])
def test_other_formats_are_refused(kind: str) -> None:
    try:
        data = encoded(picture(), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(ImageInvalid):
        open_image(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html>404</html>",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"GIF89a" + bytes(100),
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 30,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xd7\xcd\xc6\x9a" + bytes(60),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(JobError) as refusal:
        open_image(data)
    assert refusal.value.code in ("image_invalid", "image_too_large")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_refused(kind: str, part: float) -> None:
    noise = Image.effect_noise((200, 150), 90)
    data = encoded(noise, kind)
    with pytest.raises(ImageInvalid):
        open_image(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        ((100, 100), ImageLimits(max_pixels=9_999)),
        ((101, 2), ImageLimits(max_edge=100)),
        ((2, 101), ImageLimits(max_edge=100)),
        ((201, 1), ImageLimits()),
        ((1, 201), ImageLimits()),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_limits_are_checked(kind: str, size: tuple[int, int], limits: ImageLimits) -> None:
    with pytest.raises(ImageTooLarge) as refusal:
        open_image(encoded(Image.new("RGB", size), kind), limits)
    assert str(refusal.value).endswith(".")


def test_what_just_meets_the_limits_is_opened() -> None:
    limits = ImageLimits(max_pixels=200, max_edge=200, max_ratio=200)
    assert open_image(encoded(Image.new("RGB", (200, 1)), "PNG"), limits).size == (200, 1)


@pytest.mark.parametrize("side", [8_001, 9_500, 13_400, 16_384, 30_000, 2**31 - 1])
def test_a_bomb_is_refused_before_its_pixels_take_memory(side: int) -> None:
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ImageTooLarge, ImageInvalid)) as refusal:
            open_image(png(side, side, 8, 2, b""))
    assert refusal.value.code == "image_too_large" or side > 2**30
    assert time.monotonic() - start < 2.0


def test_a_bomb_is_refused_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLarge):
            open_image(png(10_000, 10_000, 8, 2, b""))


def test_a_gif_frame_beyond_its_screen_counts() -> None:
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    frame = data.index(b"\x2c", 13)
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(ImageTooLarge):
        open_image(bytes(data))


def test_a_webp_canvas_beyond_the_limits_is_refused() -> None:
    image = Image.new("RGBA", (8, 8), (1, 2, 3, 4))
    data = bytearray(encoded(image, "WEBP", exif=_turned(1)))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xff\x3f\x00\xff\x3f\x00"
    with pytest.raises(JobError):
        open_image(bytes(data))


def test_a_jpeg_that_passes_over_its_pixels_again_and_again_is_refused() -> None:
    data = encoded(picture(), "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    again = data[scans[1] : scans[2]]
    start, end = data[: scans[1]], data[scans[1] :]
    assert open_image(start + again * 20 + end).size == SIZE
    with pytest.raises(ImageInvalid, match="scans"):
        open_image(start + again * 100 + end)


def test_scans_of_thumbnails_and_behind_the_picture_do_not_count() -> None:
    segment = b"\xff\xe2" + struct.pack(">H", 1_002) + b"\xff\xda" * 500
    data = encoded(picture(), "JPEG")
    assert open_image(data[:2] + segment + data[2:] + b"\xff\xda" * 500).size == SIZE


def test_scans_hidden_in_a_segment_that_decoders_do_not_know_count() -> None:
    data = encoded(picture(), "JPEG", progressive=True)
    end = data.rindex(b"\xff\xd9")
    hidden = b"\xff\x05\xff\xff" + b"\xff\xda\x00\x02" * 100
    with pytest.raises(ImageInvalid, match="scans"):
        open_image(data[:end] + hidden + data[end:])


def test_a_jpeg_of_countless_segments_is_refused() -> None:
    data = encoded(picture(), "JPEG")
    with pytest.raises(ImageInvalid, match="segments"):
        open_image(data[:2] + b"\xff\xfe\x00\x02" * MAX_PARTS + data[2:])


@pytest.mark.parametrize("junk", [b"\xff", b"\x00"])
def test_a_jpeg_with_much_between_its_segments_is_refused(junk: bytes) -> None:
    data = encoded(picture(), "JPEG")
    _, end = data[4:6], 4 + int.from_bytes(data[4:6], "big")
    assert open_image(data[:end] + junk * 100 + data[end:]).size == SIZE
    with pytest.raises(ImageInvalid, match="segments"):
        open_image(data[:end] + junk * (MAX_JUNK + 1) + data[end:])


def test_a_png_of_countless_chunks_is_refused() -> None:
    data, chunk = encoded(picture(), "PNG"), b"\x00\x00\x00\x00abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    assert open_image(data[:33] + chunk * 1_000 + data[33:]).size == SIZE
    with pytest.raises(ImageInvalid, match="chunks"):
        open_image(data[:33] + chunk * MAX_PARTS + data[33:])


@pytest.mark.parametrize("part", [b"!\xfe\x00", b"!\xfe\x01a\x00", b"\x00"])
def test_a_gif_of_countless_blocks_is_refused(part: bytes) -> None:
    data = encoded(picture(), "GIF")
    start = 13 + 3 * 2 ** (data[10] % 8 + 1)
    assert open_image(data[:start] + part * 1_000 + data[start:]).size == SIZE
    for parts in (part * (MAX_PARTS + 1), b"!\xfe" + b"\x01a" * MAX_PARTS + b"\x00"):
        with pytest.raises(ImageInvalid, match="blocks"):
            open_image(data[:start] + parts + data[start:])


# --- What stands beside the pixels ---


def _exif_of_many_tags(tags: int = 65_535) -> bytes:
    """Descriptions that all name the same 100 kB, and an orientation."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6)
    entries += b"".join(struct.pack("<HHII", 0x0200 + at % 60_000, 2, 2_000, 8) for at in range(tags - 1))
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries


def _in_chunks(*chunks: bytes) -> bytes:
    """Behind the header of a PNG."""
    data = encoded(picture(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def _in_segments(*segments: bytes) -> bytes:
    """Behind the first segment of a JPEG."""
    data = encoded(picture(), "JPEG")
    end = 4 + int.from_bytes(data[4:6], "big")
    return data[:end] + b"".join(segments) + data[end:]


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _hexadecimal(exif: bytes) -> bytes:
    return f"\nexif\n{len(exif):8}\n{exif.hex()}".encode()


_MANY_TAGS = _exif_of_many_tags()
_COSTLY = {
    "eXIf": _in_chunks(chunk(b"eXIf", _MANY_TAGS)),
    "zTXt": _in_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_hexadecimal(_MANY_TAGS)[: 10**6]))),
    "tEXt": _in_chunks(chunk(b"tEXt", b"Raw profile type exif\0" + _hexadecimal(_MANY_TAGS))),
    "texts": _in_chunks(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 60),
    "profiles": _in_chunks(*[chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6)))] * 2_000),
    "APP1": _in_segments(
        *(_segment(0xE1, b"Exif\0\0" + _MANY_TAGS[at : at + 60_000]) for at in range(0, len(_MANY_TAGS), 60_000))
    ),
    "APP1 without end": _in_segments(*[_segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 300),
    "APP2": _in_segments(*[_segment(0xE2, b"ICC_PROFILE\0" + bytes(20))] * 9_000),
    "APP2 of a MPO": _in_segments(_segment(0xE2, b"MPF\0" + _MANY_TAGS[:65_000])),
    "APP13": _in_segments(*[_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_000)] * 200),
    "EXIF": encoded(picture(), "WEBP", lossless=True, exif=_MANY_TAGS),
}


@pytest.mark.parametrize("kind", _COSTLY)
def test_what_stands_beside_the_pixels_costs_nothing_and_says_nothing(kind: str) -> None:
    data = _COSTLY[kind]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        started = time.process_time()
        opened = open_image(data)
        took = time.process_time() - started
    assert took < 0.05
    assert warned == []
    assert opened.size in (SIZE, SIZE[::-1])


def test_the_orientation_is_found_in_exif_of_any_size() -> None:
    for kind in ("eXIf", "tEXt", "zTXt", "APP1", "EXIF"):
        assert open_image(_COSTLY[kind]).size == SIZE[::-1], kind


_XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "data",
    [
        _in_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP)),
        _in_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(_XMP))),
        _in_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_hexadecimal(_turned(6))))),
        _in_segments(_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + _XMP)),
        _in_segments(_segment(0xE1, _turned(6)), _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0")),
        encoded(picture(), "WEBP", lossless=True, xmp=_XMP),
    ],
)
def test_an_orientation_in_other_places_is_pillows(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    assert expected.size == SIZE[::-1]
    assert difference(open_image(data), expected) == 0


def test_a_stranger_fills_no_log(tmp_path: Path) -> None:
    for number, data in enumerate((*_COSTLY.values(), png(9_500, 9_500, 8, 2, b""), png(9_501, 9_500, 8, 2, b""))):
        (tmp_path / f"{number}").write_bytes(data)
    code = """if True:
        import logging
        import sys
        from contextlib import suppress
        from pathlib import Path
        from config.logging import configure
        from tasks.errors import JobError
        from worker.images.decode import open_image
        configure("DEBUG", logging.Formatter())
        for file in Path(sys.argv[1]).iterdir():
            with suppress(JobError):
                open_image(file.read_bytes())"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"caNv"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"a\0\0broken", b"a\0\0" + zlib.compress(bytes(5 * 10**6)), bytes(10**7)]
)
def test_a_defect_in_what_the_pixels_do_not_need_does_not_cost_the_picture(name: bytes, content: bytes) -> None:
    sound = chunk(name, content)
    for part in (sound, sound[:-4] + b"\0\0\0\0"):
        assert difference(open_image(_in_chunks(part)), picture()) == 0
    data = encoded(picture(), "PNG")
    assert difference(open_image(data[:-12] + sound[:-1]), picture()) == 0


@pytest.mark.parametrize("transparency", [bytes(300), b"\0\0", b""])
def test_broken_transparency_is_left_out(transparency: bytes) -> None:
    broken = chunk(b"tRNS", transparency)[:-4] + b"\0\0\0\0"
    assert difference(open_image(_in_chunks(broken)), picture()) == 0


def test_a_png_without_its_end_is_opened() -> None:
    assert difference(open_image(encoded(picture(), "PNG")[:-12]), picture()) == 0


def noise(size: tuple[int, int]) -> Image.Image:
    """The same for every run, unlike Pillow's own."""
    return Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("behind", [b"", bytes(100), b"junk" * 999])
def test_a_jpeg_without_its_last_marker_is_opened(options: dict[str, Any], mode: str, lost: int, behind: bytes) -> None:
    data = encoded(noise((203, 151)).convert(mode), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    assert difference(open_image(data[:-lost] + (behind if lost == 2 else b"")), open_image(data)) == 0


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}])
def test_a_jpeg_that_lacks_pixels_is_refused(options: dict[str, Any]) -> None:
    data = encoded(noise((203, 151)), "JPEG", **options)
    half_bytes = [at for at in range(20, 6_000) if data[-at - 1 :][:2] == b"\xff\0"]
    assert half_bytes
    for lost in (*range(20, 40), 200, 2_000, *half_bytes):
        with pytest.raises(ImageInvalid, match="before its last pixels"):
            open_image(data[:-lost])


# --- Phones, panoramas, AVIF ---


@pytest.mark.parametrize("size", [(8_160, 6_144), (16_382, 3_628), (40_000, 1_500)])
def test_pictures_of_phones_and_panoramas_are_opened_by_default(size: tuple[int, int]) -> None:
    data = encoded(Image.linear_gradient("L").resize(size), "JPEG")
    opened = open_image(data)
    assert opened.size == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    expected = Image.linear_gradient("L").resize(opened.size).convert("RGB")
    assert difference(opened.resize((50, 50)), expected.resize((50, 50))) <= 3
    assert open_image(encoded(Image.new("1", size), "PNG")).size == size


def test_up_to_forty_megapixels_a_jpeg_is_decoded_in_full() -> None:
    assert open_image(encoded(Image.new("L", (8_000, 5_000)), "JPEG")).size == (8_000, 5_000)
    assert open_image(encoded(Image.new("L", (8_000, 5_001)), "JPEG")).size == (4_000, 2_501)


def test_more_pixels_are_the_operators_to_allow() -> None:
    data = encoded(Image.new("L", (13_300, 13_300)), "JPEG")
    with pytest.raises(ImageTooLarge, match="64,000,000"):
        open_image(data)
    assert open_image(data, ImageLimits(max_pixels=178_000_000)).size == (3_325, 3_325)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow opens no AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_opened_upright(orientation: int) -> None:
    clear = picture()
    clear.putalpha(Image.radial_gradient("L").resize(SIZE))
    for image in (picture(), clear, picture().convert("L")):
        data = encoded(image, "AVIF", exif=_turned(orientation), quality=95)
        with Image.open(io.BytesIO(data)) as plain:
            turned = ImageOps.exif_transpose(plain).convert("RGBA")
        white = Image.new("RGBA", turned.size, WHITE)
        expected = Image.alpha_composite(white, turned).convert("RGB")
        assert difference(open_image(data), expected) == 0


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow opens no AVIF")
def test_avif_keeps_the_limits_and_never_reads_exif(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "AVIF", exif=_turned(6))
    monkeypatch.setattr(Image.Exif, "load", _raise(AssertionError()))
    assert open_image(data).size == SIZE[::-1]
    with pytest.raises(ImageTooLarge):
        open_image(data, ImageLimits(max_pixels=100))
    for broken in (data[:-500], data[:40], data[:200] + bytes(len(data) - 200)):
        with pytest.raises(ImageInvalid):
            open_image(broken)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "film"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a --><svg/>', "SVG"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"BM\x36\0\0\0\0\0\0\0\x36\0", "BMP"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_another_form_is_named(data: bytes, name: str) -> None:
    with pytest.raises(ImageInvalid, match=f"{name}.*: send JPEG, PNG, WebP, GIF or AVIF"):
        open_image(data + bytes(50))


# --- Memory ---

_LARGE = (8_000, 5_000)


def _flat(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, _LARGE, colour)


_LARGE_FILES: dict[str, Callable[[], bytes]] = {
    "palette": lambda: encoded(_flat("P", 1), "PNG", transparency=bytes([255, 128, 0])),
    "palette, one clear colour": lambda: encoded(_flat("P", 1), "GIF", transparency=0),
    "alpha": lambda: encoded(_flat("RGBA", (*RED, 9)), "PNG", compress_level=1),
    "grey and alpha": lambda: encoded(_flat("LA", (9, 9)), "PNG", compress_level=1),
    "one clear colour": lambda: encoded(_flat("RGB", RED), "PNG", compress_level=1, transparency=RED),
    "sixteen bits": lambda: encoded(_flat("I;16", 9), "PNG", compress_level=1, transparency=9),
    "upright": lambda: encoded(_flat("RGB", RED), "JPEG", exif=_turned(6)),
    "CMYK": lambda: encoded(_flat("CMYK", (0, 9, 9, 0)), "JPEG", exif=_turned(6)),
    "fifty megapixels": lambda: encoded(Image.new("RGB", (8_160, 6_144), RED), "JPEG", exif=_turned(6)),
    "no end": lambda: encoded(_flat("L", 9), "JPEG")[:-2],
}


@pytest.mark.parametrize("kind", _LARGE_FILES)
def test_a_picture_at_the_limit_takes_little_more_than_its_pixels(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_LARGE_FILES[kind]())
    code = """if True:
        import resource, sys
        from worker.images.decode import open_image
        data = open(sys.argv[1], "rb").read()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        image = open_image(data)
        print(4 * image.width * image.height, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, check=True)
    decoded, peak = map(int, run.stdout.split())
    assert peak < decoded + 250_000_000


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_in_strips_every_pixel_is_what_it_was(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.linear_gradient("L").convert("I;16") if mode == "I;16" else picture((301, 203)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.radial_gradient("L").resize(image.size))
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG", exif=_turned(7))
    whole = open_image(data)
    monkeypatch.setattr("worker.images.decode.STRIP_PIXELS", 1_000)
    assert difference(open_image(data), whole) == 0


def test_too_little_memory_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "PNG")
    monkeypatch.setattr(Image.Image, "convert", _raise(MemoryError()))
    with pytest.raises(OutOfMemory):
        open_image(data)


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"),
        SyntaxError("x"),
        ValueError("x"),
        EOFError("x"),
        struct.error("x"),
        zlib.error("x"),
        TypeError("x"),
        IndexError("x"),
        KeyError("x"),
        OverflowError("x"),
        ZeroDivisionError("x"),
        UnidentifiedImageError("x"),
    ],
)
def test_every_error_of_a_decoder_is_mapped(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", _raise(error))
    with pytest.raises(ImageInvalid) as refusal:
        open_image(encoded(Image.new("RGB", SIZE), "PNG"))
    assert refusal.value.args[0] == "image_invalid"


def test_a_time_limit_is_no_decoders_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class SoftTimeLimit(Exception):
        pass

    monkeypatch.setattr(Image.Image, "convert", _raise(SoftTimeLimit()))
    with pytest.raises(SoftTimeLimit):
        open_image(encoded(Image.new("RGB", SIZE), "PNG"))


def _raise(error: Exception) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


# --- Mutations ---


def _mutated(data: bytes, chance: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 2, 8))):
        at = chance.randrange(len(mutant))
        match chance.randrange(4):
            case 0:
                mutant[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 1:
                del mutant[at : at + chance.randrange(1, 20)]
            case 2:
                mutant[at:at] = chance.randbytes(chance.randrange(1, 20))
            case 3:
                mutant[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
        if not mutant:
            return b""
    return bytes(mutant)


def _seeds() -> list[bytes]:
    clear = picture()
    clear.putalpha(Image.radial_gradient("L").resize(SIZE))
    frames = [picture(), Image.new("RGB", SIZE)]
    many = {"save_all": True, "append_images": frames[1:]}
    return [
        encoded(picture(), "JPEG", exif=_turned(6)),
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture().convert("CMYK"), "JPEG"),
        encoded(picture(), "MPO", **many),
        encoded(clear, "PNG", exif=_turned(8), icc_profile=b"profile" * 9),
        encoded(picture().quantize(16), "PNG", transparency=3),
        encoded(Image.new("I;16", SIZE, 999), "PNG"),
        encoded(frames[0], "PNG", **many),
        encoded(frames[0], "GIF", **many, comment=b"hello"),
        encoded(clear, "GIF"),
        encoded(picture(), "WEBP", exif=_turned(3)),
        encoded(clear, "WEBP", lossless=True),
        encoded(frames[0], "WEBP", **many),
    ]


@pytest.mark.filterwarnings("ignore")
def test_five_hundred_mutants_open_or_end_in_an_error_of_ours() -> None:
    chance = random.Random(7)
    seeds = _seeds()
    limits = replace(DEFAULT_LIMITS, max_pixels=1_000_000)
    opened = 0
    for number in range(500):
        with suppress(ImageInvalid, ImageTooLarge):
            image = open_image(_mutated(seeds[number % len(seeds)], chance), limits)
            assert image.mode == "RGB", number
            assert image.width * image.height <= limits.max_pixels, number
            opened += 1
    assert 50 < opened < 450


def test_many_threads_open_pictures_at_once() -> None:
    data = [encoded(picture(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")] * 16
    with ThreadPoolExecutor(8) as threads:
        assert {image.size for image in threads.map(open_image, data)} == {SIZE}


def test_a_failures_detail_says_what_it_was() -> None:
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "PNG")
    for data, limits, detail in [
        (b"<!doctype html><title>Log in</title>", DEFAULT_LIMITS, "not_a_picture"),
        (good.getvalue()[:60], DEFAULT_LIMITS, "decode"),
        (good.getvalue(), ImageLimits(max_pixels=10), "pixels"),
        (good.getvalue(), ImageLimits(max_edge=10), "edge"),
        (good.getvalue(), ImageLimits(max_ratio=0.5), "ratio"),
    ]:
        with pytest.raises(JobError) as failure:
            open_image(data, limits)
        assert failure.value.detail == detail
