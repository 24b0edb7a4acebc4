"""Files that are refused, and what stands beside the pixels."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from tasks.errors import ImageInvalid, ImageTooLarge, JobError
from tests.support.decoding import SIZE, _turned, chunk, difference, picture, png
from tests.support.pictures import encoded
from worker.images.decode import ImageLimits, open_image
from worker.images.metadata import MAX_JUNK, MAX_PARTS

# Refusals


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


def test_a_picture_at_the_limits_is_opened() -> None:
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
    # A file without its end is decoded twice: half as many scans are allowed.
    assert open_image(start + again * 50 + end).size == SIZE
    assert open_image((start + again * 20 + end)[:-2]).size == SIZE
    with pytest.raises(ImageInvalid, match="scans"):
        open_image((start + again * 50 + end)[:-2])


def test_scans_of_thumbnails_and_behind_the_picture_do_not_count() -> None:
    segment = b"\xff\xe2" + struct.pack(">H", 1_002) + b"\xff\xda" * 500
    data = encoded(picture(), "JPEG")
    assert open_image(data[:2] + segment + data[2:] + b"\xff\xda" * 500).size == SIZE


def test_scans_hidden_in_an_unknown_segment_count() -> None:
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


# What stands beside the pixels


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
def test_data_beside_the_pixels_costs_no_time_and_is_not_repeated(kind: str) -> None:
    data = _COSTLY[kind]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        started = time.thread_time()
        opened = open_image(data)
        took = time.thread_time() - started
    assert took < 0.2
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


def test_a_broken_picture_does_not_fill_the_log(tmp_path: Path) -> None:
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
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
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
