"""Bytes to an RGB picture, within limits: a stranger's file meets few decoders, and not for long."""

from __future__ import annotations

import io
import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Imported for their registration: Pillow's lazy one would load all its 43 formats, from many threads at once.
from PIL import (
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from tasks.errors import ImageInvalid, ImageTooLarge, JobError

#: Of Pillow's formats; among the others, EPS runs Ghostscript. Phones' MPO files open as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: A JPEG's passes over all its pixels. Encoders make about ten; 330 kB with 2,000 took 46 seconds to decode.
MAX_SCANS = 64
#: A file's parts, which Pillow walks in Python: a JPEG's segments and a PNG's chunks, and a GIF's blocks before its
#: first picture. Real files have some thousands at most.
MAX_PARTS = 10_000
#: Bytes of fillings and junk between a JPEG's segments, which it skips one by one.
MAX_JUNK = 10_000
#: Bytes of EXIF that are looked at for the orientation. In a JPEG there are hardly more.
MAX_EXIF = 2**17

#: What Pillow raises for broken files. Not Exception: the task's own time limit must get through.
_DECODER_ERRORS = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,  # OverflowError and ZeroDivisionError
    Warning,  # where the process turns Pillow's warnings into errors
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_JPEG_START = b"\xff\xd8\xff"
# Only markers with a length, and the end: not escapes, fillings, restarts nor what decoders skip.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = 0xDA
_PNG_START = b"\x89PNG\r\n\x1a\n"
_GIF_START = b"GIF8"
_GIF_EXTENSION = 0x21
_GIF_PICTURE_OR_END = b",;"

_SIXTEEN_BITS = range(65_536)
_TO_EIGHT_BITS = [round(value / 257) for value in _SIXTEEN_BITS]


@dataclass(frozen=True)
class ImageLimits:
    """What is decoded. Checked on the header, before any memory is taken for pixels.

    Above 178 million pixels Pillow refuses too, whatever is set here.
    """

    max_pixels: int = 40_000_000
    #: Pixels of the longer side.
    max_edge: int = 16_384
    #: The longer side divided by the shorter.
    max_ratio: float = 200


DEFAULT_LIMITS = ImageLimits()


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, target: int | None = None) -> Image.Image:
    """A JPEG's, PNG's, WebP's or GIF's first frame: RGB, upright, on white, without EXIF and colour profile.

    `target` (pixels) lets a JPEG be decoded smaller, with no edge below it: about half the time for a large
    photograph, but other pixels than the full decoding scaled down, so answers may change. Off by default.
    Raises ImageTooLarge for pictures beyond the limits and ImageInvalid for whatever cannot be decoded.
    """
    _check_parts(data)
    with _translated(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_limits(image, limits)
        if target is not None:
            image.draft(None, (target, target))
        image.load()
        return _plain(_upright(image))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except JobError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise ImageTooLarge from None
    except _DECODER_ERRORS:
        raise ImageInvalid from None


def _check_limits(image: Image.Image, limits: ImageLimits) -> None:
    shorter, longer = sorted(image.size)
    if shorter < 1:
        raise ImageInvalid("The image has no pixels: send another.")
    if shorter * longer > limits.max_pixels:
        raise ImageTooLarge(f"The image has more than {limits.max_pixels:,} pixels: send a smaller one.")
    if longer > limits.max_edge:
        raise ImageTooLarge(f"The image's longer side is over {limits.max_edge:,} pixels: send a smaller one.")
    if longer > shorter * limits.max_ratio:
        raise ImageTooLarge(f"One side of the image is over {limits.max_ratio:g} times the other: crop it.")


def _check_parts(data: bytes) -> None:
    """Raises ImageInvalid for more of them than Pillow walks in a moment."""
    if data.startswith(_JPEG_START):
        _check_jpeg_segments(data)
    elif data.startswith(_PNG_START):
        _check_count(_png_chunks(data), "PNG", "chunks")
    elif data.startswith(_GIF_START):
        _check_count(_gif_blocks(data), "GIF", "blocks")


def _check_jpeg_segments(data: bytes) -> None:
    # Pixels bound a decoder's memory, but a JPEG may pass over all of them again and again. Thumbnails (in
    # a segment) and what follows the image (films, depth maps) are not decoded and do not count.
    position = scans = junk = 0
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        # What stands between the segments of a scan is its pixels.
        junk += 0 if scans else found.start() - position
        scans += found[1][0] == _START_OF_SCAN
        if scans > MAX_SCANS or junk > MAX_JUNK:
            break
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise ImageInvalid("The JPEG has too many scans or segments: save it anew.")


def _check_count(parts: Iterator[int], form: str, name: str) -> None:
    if next(itertools.islice(parts, MAX_PARTS, None), None) is not None:
        raise ImageInvalid(f"The {form} has too many {name}: save it anew.")


def _png_chunks(data: bytes) -> Iterator[int]:
    """Where they begin."""
    position = len(_PNG_START)
    while position < len(data):
        yield position
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where those begin that stand before the first picture; what is none is skipped byte by byte."""
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0)
    while position < len(data) and data[position] not in _GIF_PICTURE_OR_END:
        yield position
        if data[position] == _GIF_EXTENSION:
            position += 2
            while position < len(data) and data[position]:
                yield position
                position += 1 + data[position]
        position += 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    # Broken EXIF is no reason to refuse good pixels; ImageOps.exif_transpose stumbles over it.
    if len(image.info.get("exif") or b"") > MAX_EXIF:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_sixteen_bits(image)
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    plain = image.convert("RGB")
    # convert() has made a new image, but handed on the EXIF and the colour profile.
    plain.info = {}
    return plain


def _on_white(image: Image.Image) -> Image.Image:
    # alpha_composite, as the stock IDEFICS processor does it: pasting rounds otherwise.
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips: everything above 255 of 65,535 would be white.
    wide = image.convert("I")
    plain = wide.point(_TO_EIGHT_BITS, "L").convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        mask = wide.point([255 * (value == clear) for value in _SIXTEEN_BITS], "L")
        plain.paste((255, 255, 255), mask=mask)
    plain.info = {}
    return plain
