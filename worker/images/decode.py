"""Decode a file to an RGB picture. Limits bound the memory and time that an untrusted file can take."""

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
from worker.images import metadata
from worker.images.metadata import RESTARTS, StrippedFile

try:
    from PIL import _avif
except ImportError:  # a Pillow built without AVIF
    _avif = None  # type: ignore[assignment]

# This module handles the cases that Pillow warns of, and a line for each untrusted picture would fill the log.
warnings.filterwarnings("ignore", module=r"PIL\.")

#: Pillow's formats that are opened. Others are unsafe: EPS would run Ghostscript. AVIF is decoded without Pillow's
#: plug-in, which would parse the EXIF.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: Maximum pixels of a JPEG that is decoded at full size. A larger one is decoded at a half, a quarter or an eighth of
#: its size, to save memory; models use far fewer pixels.
FULL_PIXELS = 40_000_000
#: Pictures of other formats with more pixels are decoded one at a time, since libraries hold several copies of them.
ALONE_PIXELS = 10_000_000
#: Exceptions that Pillow raises for broken files. Not Exception: the task's own time limit must get through.
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

#: By EXIF's orientation, the transposition that makes the picture upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Pixels that are converted or compared at once: the intermediate forms take several times a picture's memory.
STRIP_PIXELS = 2_000_000
_END_OF_IMAGE = b"\xff\xd9"
#: Bits that differ from the zeros that libjpeg decodes after the end of a file, from the first one on.
_GARBAGE = b"\xaa" * 4_096

_SIXTEEN_BITS = range(65_536)
_TO_EIGHT_BITS = [round(value / 257) for value in _SIXTEEN_BITS]


@dataclass(frozen=True)
class ImageLimits:
    """Limits on decoded pictures. They are checked on the header, before memory is allocated for pixels.

    Pillow itself refuses pictures of more than 178 million pixels.
    """

    max_pixels: int = 64_000_000
    #: Maximum pixels of the longer side. The default is the JPEG format's limit, which panoramas approach.
    max_edge: int = 65_535
    #: Maximum ratio of the longer side to the shorter.
    max_ratio: float = 200


DEFAULT_LIMITS = ImageLimits()
_alone = threading.Lock()


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, target: int | None = None) -> Image.Image:
    """Decode the first frame of a JPEG, PNG, WebP, GIF or AVIF: RGB, upright, on white, without EXIF or colour profile.

    `target` lets a JPEG be decoded smaller, with no side below that number of pixels. This takes about half the time
    for a large photograph, but its pixels are not those of the full decoding scaled down, so answers may change.
    Raises ImageTooLarge for pictures beyond the limits, ImageInvalid for files that cannot be decoded, and OutOfMemory.
    """
    if other := foreign(data):
        raise ImageInvalid(f"The image is {other}: send {PICTURE_FORMS}.", detail="not_a_picture")
    with _translated():
        file = metadata.strip(data)
        plain, orientation = _decoded(file, limits, target)
        # Last, when the earlier forms have been freed: each form of a large picture takes much memory.
        transposition = _TRANSPOSITIONS.get(orientation)
        return plain if transposition is None else plain.transpose(transposition)


def _decoded(file: StrippedFile, limits: ImageLimits, target: int | None) -> tuple[Image.Image, int]:
    """A picture as stored in its file, and its EXIF orientation (1 to 8)."""
    if file.next_restart is None:
        return _opened(file, limits, target)
    # The file may have all its pixels. libjpeg decodes missing ones from the bytes that follow, so the file is decoded
    # with two different endings: if the pictures differ, pixels are missing.
    plain, orientation = _opened(_ended(file, _END_OF_IMAGE), limits, target)
    other, _ = _opened(_ended(file, _garbage(file.next_restart) + _END_OF_IMAGE), limits, target)
    if not _are_equal(plain, other):
        raise ImageInvalid("The JPEG ends before its last pixels: send the whole file.", detail="truncated")
    return plain, orientation


def _garbage(next_restart: int) -> bytes:
    """Bytes that no encoder wrote. A decoder that waits for a restart marker skips all bytes before it, so the next
    ones are among them."""
    numbers = ((next_restart + step) % RESTARTS for step in range(RESTARTS))
    return _GARBAGE + b"".join(bytes([0xFF, 0xD0 + number]) + _GARBAGE for number in numbers)


def _ended(file: StrippedFile, end: bytes) -> StrippedFile:
    # A last 0xFF is half of a marker, or of a pixel's byte: together with the appended bytes it would form a marker.
    return StrippedFile(file.data.rstrip(b"\xff") + end, file.orientation)


def _are_equal(image: Image.Image, other: Image.Image) -> bool:
    """Whether two RGB images of one size have the same pixels."""
    return not any(ImageChops.difference(image.crop(box), other.crop(box)).getbbox() for box in _strips(image.size))


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows that cover an image of `size`, with about STRIP_PIXELS pixels each."""
    width, height = size
    rows = max(1, STRIP_PIXELS // width)
    return ((0, top, width, min(top + rows, height)) for top in range(0, height, rows))


def _opened(file: StrippedFile, limits: ImageLimits, target: int | None) -> tuple[Image.Image, int]:
    if is_avif(file.data):
        return _opened_avif(file.data, limits)
    with Image.open(io.BytesIO(file.data), formats=FORMATS) as image:
        _check_limits(image.size, limits)
        if target is not None:
            image.draft(None, (target, target))
        elif image.format == "JPEG":
            _reduce(image)
        with _alone if image.format != "JPEG" and _pixels(image.size) > ALONE_PIXELS else contextlib.nullcontext():
            image.load()
            return _plain(image), file.orientation or _orientation(image)


def _opened_avif(data: bytes, limits: ImageLimits) -> tuple[Image.Image, int]:
    if _avif is None:
        raise ImageInvalid("The image is AVIF, which this worker's Pillow does not open: send JPEG, PNG, WebP or GIF.")
    # With one thread: job threads decode in parallel already.
    decoder = _avif.AvifDecoder(data, "auto", 1)
    size, _, mode, _, _, orientation, _ = decoder.get_info()
    _check_limits(size, limits)
    with _alone if _pixels(size) > ALONE_PIXELS else contextlib.nullcontext():
        pixels, *_ = decoder.get_frame(0)
        # This orientation is the file's own rotation and mirroring, not that of its EXIF.
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
    return metadata.orientation(image.info.get("exif") or b"", image.info.get("xmp") or b"")


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
    if is_copied or _pixels(image.size) <= STRIP_PIXELS:
        plain = convert(image)
    else:
        plain = Image.new("RGB", image.size)
        for box in _strips(image.size):
            plain.paste(convert(image.crop(box)), box[:2])
    plain.info = {}
    return plain


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    if image.mode.startswith("I"):
        return _from_sixteen_bits
    return _on_white if image.has_transparency_data else _to_rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    # alpha_composite, as in the stock IDEFICS processor: pasting rounds differently.
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips: each of the 65,536 values above 255 would be white.
    wide = image.convert("I")
    plain = wide.point(_TO_EIGHT_BITS, "L").convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        mask = wide.point([255 * (value == clear) for value in _SIXTEEN_BITS], "L")
        plain.paste((255, 255, 255), mask=mask)
    return plain
