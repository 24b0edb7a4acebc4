"""Pictures that show every turn, and files that Pillow would not write."""

from __future__ import annotations

import struct
import zlib

from PIL import Image, ImageChops

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


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()
