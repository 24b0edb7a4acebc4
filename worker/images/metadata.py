"""Remove metadata from a picture's file before a decoder reads the file. Pure.

Decoders parse metadata in Python, where a small file can take much time: EXIF with thousands of tags, compressed texts,
profiles in thousands of segments. Only the orientation is kept, and defects in other metadata do not make a job fail.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from tasks.errors import ImageInvalid

#: Maximum scans of a JPEG, each of which is a pass over all its pixels. Encoders write about ten; a file of 330 kB with
#: 2,000 scans took 46 seconds to decode. A file without its end is decoded twice, so half as many are allowed.
MAX_SCANS = 64
#: Maximum parts of a file that are walked in Python: a JPEG's segments, a PNG's chunks, and a GIF's blocks before its
#: first picture. Real files have at most a few thousand.
MAX_PARTS = 10_000
#: Maximum bytes of padding and junk between a JPEG's segments, which are skipped one by one.
MAX_JUNK = 10_000
#: Maximum bytes of EXIF and XMP that are inflated, or read as text, for the orientation.
MAX_METADATA = 2**17
#: Maximum tags of EXIF's first directory that are read. They are sorted, and the orientation has a low number.
MAX_TAGS = 512

_JPEG_START = b"\xff\xd8\xff"
# Only markers with a length, and the end; not escapes, padding, restarts and markers that decoders skip. Before the
# first scan, markers without a length in Pillow (0xC8 and from 0xF0 on) are junk: libjpeg rejects them.
_HEADER_MARKER = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
_SCAN_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = 0xDA
_RESTART = 0xD0
#: Restart markers are numbered from 0 to 7, again and again.
RESTARTS = 8
#: Segments that do not affect pixels: APP1 to APP13, APP15, comments. APP0 (JFIF) and APP14 (Adobe) define colours.
_JPEG_UNNEEDED = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_EXIF_SEGMENT = 0xE1
_XMP_START = b"http://ns.adobe.com/xap/1.0/\0"

_PNG_START = b"\x89PNG\r\n\x1a\n"
#: Bytes of a chunk beside its content: length, name, check sum.
_PNG_FRAME = 12
#: Bytes of a palette's transparency: an alpha value for each of 256 colours.
_MAX_TRANSPARENCY = 256
_RAW_PROFILE = b"Raw profile type exif\0"
_XMP_TEXT = b"XML:com.adobe.xmp\0"

_GIF_START = b"GIF8"
_GIF_EXTENSION = 0x21
_GIF_PICTURE_OR_END = b",;"

_EXIF_START = re.compile(rb"(?:Exif\0\0){0,2}")
_BYTE_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">"}
_ORIENTATION = 274
#: EXIF's unsigned integer types, BYTE, SHORT and LONG, with their struct format.
_NUMBERS = {1: "B", 3: "H", 4: "I"}
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")


@dataclass(frozen=True, slots=True)
class StrippedFile:
    """A picture's file without metadata."""

    data: bytes
    #: EXIF's orientation, 1 (upright) to 8. None: the decoder must read the EXIF itself.
    orientation: int | None = None
    #: For a JPEG without its last marker, which may still hold all pixels: the number of the restart marker that would
    #: come next, 0 to 7. None for every other file.
    next_restart: int | None = None


def strip(data: bytes) -> StrippedFile:
    """Remove a file's metadata. Other formats are returned as they are. Raises ImageInvalid for too many parts."""
    if data.startswith(_JPEG_START):
        return _stripped_jpeg(data)
    if data.startswith(_PNG_START):
        return _stripped_png(data)
    if data.startswith(_GIF_START):
        _check_count(_gif_blocks(data), "GIF", "blocks")
    return StrippedFile(data)


# --- Orientation ---


def orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation (1 to 8) from EXIF, else from XMP, else 1. Broken metadata counts as missing."""
    found = _exif_orientation(exif)
    if found is None:
        match = _XMP_ORIENTATION.search(xmp, 0, MAX_METADATA)
        found = int(match[1]) if match else 1
    return found


def _exif_orientation(exif: bytes) -> int | None:
    start = _EXIF_START.match(exif)
    tiff = memoryview(exif)[start.end() if start else 0 :]
    order = _BYTE_ORDERS.get(bytes(tiff[:4]))
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (tags,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * min(tags, MAX_TAGS), 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _ORIENTATION:
                return int(struct.unpack_from(order + _NUMBERS[kind], tiff, entry + 8)[0]) if count == 1 else None
    except (struct.error, KeyError):
        pass
    return None


# --- JPEG ---


def _stripped_jpeg(data: bytes) -> StrippedFile:
    # The pixel limit bounds a decoder's memory, but a JPEG may pass over all pixels again and again. Thumbnails (in a
    # segment) and data after the image (videos, depth maps) are not decoded and do not count.
    view, kept = memoryview(data), [memoryview(data)[:2]]
    exif = xmp = b""
    position, scans, junk = 2, 0, 0
    for _ in range(MAX_PARTS):
        found = (_SCAN_MARKER if scans else _HEADER_MARKER).search(data, position)
        marker = found[1][0] if found else None
        if found is None and scans > MAX_SCANS // 2:
            break
        if found is None or marker == _END_OF_IMAGE:
            next_restart = _next_restart(data, position) if found is None and scans else None
            return StrippedFile(b"".join(kept), orientation(exif, xmp), next_restart)
        # Bytes between the segments of a scan are its pixels, not junk.
        junk += 0 if scans else found.start() - position
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS or junk > MAX_JUNK:
            break
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if marker == _START_OF_SCAN and scans == 1:
            kept.append(view[found.start() :])
        elif not scans and marker not in _JPEG_UNNEEDED:
            kept.append(view[found.start() : position])
        elif not scans and marker == _EXIF_SEGMENT:
            content = view[found.end() + 2 : position]
            exif = exif or _starting_with(b"Exif\0\0", content)
            xmp = xmp or _starting_with(_XMP_START, content)
    raise ImageInvalid("The JPEG has too many scans or segments: save it anew.", detail="parts")


def _next_restart(data: bytes, scan: int) -> int:
    """The number of the restart marker that follows the last one from offset `scan` on; 0 if there is none."""
    last = max(data.rfind(bytes([0xFF, _RESTART + number]), scan) for number in range(RESTARTS))
    return (data[last + 1] - _RESTART + 1) % RESTARTS if last >= 0 else 0


def _starting_with(start: bytes, content: memoryview) -> bytes:
    return bytes(content) if content[: len(start)] == start else b""


# --- PNG ---


def _stripped_png(data: bytes) -> StrippedFile:
    view, kept = memoryview(data), [memoryview(data)[: len(_PNG_START)]]
    exif = profile = xmp = b""
    for parts, (position, name) in enumerate(_png_chunks(data)):
        end = position + _PNG_FRAME + _png_length(data, position)
        content = view[position + 8 : end - 4]
        if not _is_ancillary(name) or (name == b"tRNS" and _is_sound_transparency(name, content, data[end - 4 : end])):
            kept.append(view[position:end])
        elif name == b"eXIf":
            exif = exif or bytes(content)
        elif name in _PNG_TEXTS:
            profile = profile or _png_text(name, content, _RAW_PROFILE)
            xmp = xmp or _png_text(name, content, _XMP_TEXT)
        if parts >= MAX_PARTS:
            raise ImageInvalid("The PNG has too many chunks: save it anew.", detail="parts")
    return StrippedFile(b"".join(kept), orientation(exif or _raw_profile(profile), xmp))


def _png_chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The offset and name of each chunk, up to the last one."""
    position, name = len(_PNG_START), b""
    while position < len(data) and name != b"IEND":
        name = data[position + 4 : position + 8]
        yield position, name
        position += _PNG_FRAME + _png_length(data, position)


def _png_length(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 4], "big")


def _is_ancillary(name: bytes) -> bool:
    # Chunks of animations are ancillary too: the default picture is the first frame. The decoder refuses invalid names.
    return name.isalpha() and name[:1].islower()


def _is_sound_transparency(name: bytes, content: memoryview, check: bytes) -> bool:
    # libpng ignores broken ancillary chunks too.
    return len(content) <= _MAX_TRANSPARENCY and zlib.crc32(content, zlib.crc32(name)) == int.from_bytes(check, "big")


def _plain_text(content: bytes) -> bytes:
    return content


def _compressed_text(content: bytes) -> bytes:
    return _inflated(content[1:])


def _international_text(content: bytes) -> bytes:
    # A flag (compressed or not), the method, then language and translated keyword, each terminated by a zero.
    *_, text = content[2:].split(b"\0", 2)
    return _inflated(text) if content[:1] == b"\1" else text


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_METADATA)
    except zlib.error:
        return b""


#: Readers of the text after a chunk's keyword, by the chunk's name.
_PNG_TEXTS = {b"tEXt": _plain_text, b"zTXt": _compressed_text, b"iTXt": _international_text}


def _png_text(name: bytes, content: memoryview, keyword: bytes) -> bytes:
    """A text chunk's text, up to MAX_METADATA bytes; empty if it has another keyword."""
    if content[: len(keyword)] != keyword:
        return b""
    return _PNG_TEXTS[name](bytes(content[len(keyword) :][:MAX_METADATA]))


def _raw_profile(text: bytes) -> bytes:
    """Decode the EXIF that ImageMagick writes as text: newline, name, newline, length, newline, hexadecimal lines."""
    try:
        *_, digits = text.split(b"\n", 3)
        compact = b"".join(digits.split())
        # A text that was cut at MAX_METADATA may end within a byte.
        return bytes.fromhex(compact[: len(compact) // 2 * 2].decode("ascii"))
    except ValueError:
        return b""


# --- GIF ---


def _check_count(parts: Iterator[int], form: str, name: str) -> None:
    if next(itertools.islice(parts, MAX_PARTS, None), None) is not None:
        raise ImageInvalid(f"The {form} has too many {name}: save it anew.", detail="parts")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Offsets of the blocks before the first picture. Bytes outside blocks are skipped one by one."""
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
