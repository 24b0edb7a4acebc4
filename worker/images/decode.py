"""Decode a file to an RGB picture, within limits: an untrusted file meets few decoders, and not for long."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Imported so that they register: Pillow would otherwise load all of its 43 formats on first use, from many threads.
from PIL import (
    GifImagePlugin,  # noqa: F401
    Image,
    ImageChops,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from tasks.errors import ImageInvalid, ImageTooLarge, JobError, OutOfMemory
from tasks.picture_forms import PICTURE_FORMS, foreign, is_avif
from worker.images import containers

try:
    from PIL import _avif
except ImportError:  # a Pillow that was built without
    _avif = None  # type: ignore[assignment]

# This module decides on what Pillow warns of, and a line for each untrusted picture would fill the log.
warnings.filterwarnings("ignore", module=r"PIL\.")

#: The formats of Pillow that are opened; of the others, EPS would run Ghostscript. AVIF is decoded without Pillow's
#: plug-in, which reads EXIF.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: Pixels up to which a JPEG is decoded in full. A larger one is decoded at a half, a quarter or an eighth of its size,
#: which takes less memory; models use far fewer pixels.
FULL_PIXELS = 40_000_000
#: Pixels above which other pictures are decoded one at a time: libraries hold several copies of them.
ALONE_PIXELS = 10_000_000
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

#: By EXIF's orientation, what makes the picture upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Pixels that are converted at once: the intermediate forms take several times a picture's memory.
STRIP_PIXELS = 2_000_000
#: Fillings that `_decoded` appends to a JPEG without an end, in place of what an encoder wrote there. Their bits begin
#: no code alike. They hold every restart marker, since a decoder that waits for one skips everything before it; the two
#: markers before the awaited one make it skip nothing.
_NO_PIXELS = [
    garbage + b"".join(bytes([0xFF, 0xD0 + (first + step) % 8]) + garbage for step in range(8))
    for first, garbage in ((0, b"\x55" * 4_096), (3, b"\xaa" * 4_096), (6, bytes(range(1, 255)) * 16))
]
_END_OF_IMAGE = b"\xff\xd9"
#: Rows that hold the last pixels of a JPEG: a unit of its coding has 32 at most.
_LAST_ROWS = 64

_SIXTEEN_BITS = range(65_536)
_TO_EIGHT_BITS = [round(value / 257) for value in _SIXTEEN_BITS]


@dataclass(frozen=True)
class ImageLimits:
    """Limits on what is decoded. Checked on the header, before memory is allocated for pixels.

    Above 178 million pixels Pillow refuses a picture too, even within these limits.
    """

    max_pixels: int = 64_000_000
    #: Pixels of the longer side. The default is the JPEG format's own limit, which panoramas approach.
    max_edge: int = 65_535
    #: The longer side divided by the shorter.
    max_ratio: float = 200


DEFAULT_LIMITS = ImageLimits()
_alone = threading.Lock()


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, target: int | None = None) -> Image.Image:
    """Decode the first frame of a JPEG, PNG, WebP, GIF or AVIF: RGB, upright, on white, without EXIF or colour profile.

    `target` lets a JPEG be decoded smaller, with no side below that many pixels: about half the time for a large
    photograph, but not the same pixels as the full decoding scaled down, so answers may change.
    Raises ImageTooLarge for pictures beyond the limits, ImageInvalid for what cannot be decoded, and OutOfMemory.
    """
    if other := foreign(data):
        raise ImageInvalid(f"The image is {other}: send {PICTURE_FORMS}.", detail="not_a_picture")
    with _translated():
        bare = containers.bare(data)
        plain, orientation = _decoded(bare, limits, target)
        # Last, when the earlier forms have been freed: each form of a large picture takes much memory.
        transposition = _TRANSPOSITIONS.get(orientation)
        return plain if transposition is None else plain.transpose(transposition)


def _decoded(bare: containers.Bare, limits: ImageLimits, target: int | None) -> tuple[Image.Image, int]:
    """A picture as stored in its file, and its EXIF orientation (1 to 8)."""
    if bare.has_end:
        return _opened(bare, limits, target)
    # All of its pixels may be there. libjpeg makes up missing ones from what follows the file: where different endings
    # give different pictures, pixels are missing.
    plain, orientation = _opened(_ended(bare, _END_OF_IMAGE), limits, target)
    last_rows = _last_rows(plain)
    for no_pixels in _NO_PIXELS:
        other, _ = _opened(_ended(bare, no_pixels + _END_OF_IMAGE), limits, target)
        if ImageChops.difference(last_rows, _last_rows(other)).getbbox():
            raise ImageInvalid("The JPEG ends before its last pixels: send the whole file.", detail="truncated")
    return plain, orientation


def _ended(bare: containers.Bare, end: bytes) -> containers.Bare:
    # A last 0xFF is half of a marker, or of a pixel's byte: together with the appended bytes it would form a marker.
    return containers.Bare(bare.data.rstrip(b"\xff") + end, bare.orientation)


def _last_rows(image: Image.Image) -> Image.Image:
    return image.crop((0, max(0, image.height - _LAST_ROWS), *image.size))


def _opened(bare: containers.Bare, limits: ImageLimits, target: int | None) -> tuple[Image.Image, int]:
    if is_avif(bare.data):
        return _opened_avif(bare.data, limits)
    with Image.open(io.BytesIO(bare.data), formats=FORMATS) as image:
        _check_limits(image.size, limits)
        if target is not None:
            image.draft(None, (target, target))
        elif image.format == "JPEG":
            _reduce(image)
        with _alone if image.format != "JPEG" and _pixels(image.size) > ALONE_PIXELS else contextlib.nullcontext():
            image.load()
            return _plain(image), bare.orientation or _orientation(image)


def _opened_avif(data: bytes, limits: ImageLimits) -> tuple[Image.Image, int]:
    if _avif is None:
        raise ImageInvalid("The image is AVIF, which this worker's Pillow does not open: send JPEG, PNG, WebP or GIF.")
    # With one thread: job threads decode in parallel already.
    decoder = _avif.AvifDecoder(data, "auto", 1)
    size, _, mode, _, _, orientation, _ = decoder.get_info()
    _check_limits(size, limits)
    with _alone if _pixels(size) > ALONE_PIXELS else contextlib.nullcontext():
        pixels, *_ = decoder.get_frame(0)
        # libavif gives the file's own rotation and mirroring, not that of its EXIF.
        return _plain(Image.frombytes(mode, size, pixels)), orientation


def _reduce(image: Image.Image) -> None:
    """Have a JPEG of more than FULL_PIXELS decoded at a smaller size."""
    width, height = image.size
    scale = next(scale for scale in (1, 2, 4, 8) if width * height <= FULL_PIXELS * scale**2)
    if scale > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _orientation(image: Image.Image) -> int:
    return containers.orientation(image.info.get("exif") or b"", image.info.get("xmp") or b"")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except JobError:
        raise
    except MemoryError:
        # Retryable: another worker, or a later attempt, may have the memory.
        raise OutOfMemory from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(detail="pixels") from None
    except UnidentifiedImageError:
        raise ImageInvalid(detail="not_a_picture") from None
    except _DECODER_ERRORS:
        raise ImageInvalid(detail="decode") from None


def _check_limits(size: tuple[int, int], limits: ImageLimits) -> None:
    shorter, longer = sorted(size)
    if shorter < 1:
        raise ImageInvalid("The image has no pixels: send another.", detail="decode")
    if shorter * longer > limits.max_pixels:
        raise ImageTooLarge(
            f"The image has more than {limits.max_pixels:,} pixels: send a smaller one.", detail="pixels"
        )
    if longer > limits.max_edge:
        raise ImageTooLarge(
            f"The image's longer side is over {limits.max_edge:,} pixels: send a smaller one.", detail="edge"
        )
    if longer > shorter * limits.max_ratio:
        raise ImageTooLarge(
            f"One side of the image is over {limits.max_ratio:g} times the other: crop it.", detail="ratio"
        )


def _plain(image: Image.Image) -> Image.Image:
    """Convert to a new RGB image, on white, without EXIF or colour profile. Each pixel is converted independently."""
    convert = _converter(image)
    is_copied = convert is _to_rgb and image.mode == "RGB"
    rows = max(1, STRIP_PIXELS // image.width)
    if is_copied or rows >= image.height:
        plain = convert(image)
    else:
        plain = Image.new("RGB", image.size)
        for top in range(0, image.height, rows):
            bottom = min(top + rows, image.height)
            plain.paste(convert(image.crop((0, top, image.width, bottom))), (0, top))
    plain.info = {}
    return plain


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    if image.mode.startswith("I"):
        return _from_sixteen_bits
    return _on_white if image.has_transparency_data else _to_rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    # alpha_composite, as the stock IDEFICS processor does it: pasting rounds differently.
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips: each value above 255 of 65,535 would be white.
    wide = image.convert("I")
    plain = wide.point(_TO_EIGHT_BITS, "L").convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        mask = wide.point([255 * (value == clear) for value in _SIXTEEN_BITS], "L")
        plain.paste((255, 255, 255), mask=mask)
    return plain
