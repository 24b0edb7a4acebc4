"""Bytes to an RGB picture, within limits: a stranger's file meets few decoders, and not for long."""

from __future__ import annotations

import io
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
#: A JPEG's parts before its end. Pillow walks them in Python; real files have some hundreds at most.
MAX_SEGMENTS = 10_000

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
    _check_jpeg_segments(data)
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


def _check_jpeg_segments(data: bytes) -> None:
    # Pixels bound a decoder's memory, but a JPEG may pass over all of them again and again. Thumbnails (in
    # a segment) and what follows the image (films, depth maps) are not decoded and do not count.
    position = scans = 0
    for _ in range(MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, position) if data.startswith(_JPEG_START) else None
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        scans += found[1][0] == _START_OF_SCAN
        if scans > MAX_SCANS:
            break
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise ImageInvalid("The JPEG has too many scans or segments: save it anew.")


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    # Broken EXIF is no reason to refuse good pixels; ImageOps.exif_transpose stumbles over it.
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
