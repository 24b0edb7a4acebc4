"""The format of a picture's file by its first bytes. Pure; the workers read the same formats."""

from __future__ import annotations

import re

#: As every message lists them.
PICTURE_FORMS = "JPEG, PNG, WebP, GIF or AVIF"

#: First bytes of the formats that the workers read, with their offsets.
_KINDS: dict[str, tuple[tuple[int, tuple[bytes, ...]], ...]] = {
    "image/jpeg": ((0, (b"\xff\xd8\xff",)),),
    "image/png": ((0, (b"\x89PNG\r\n\x1a\n",)),),
    "image/gif": ((0, (b"GIF87a", b"GIF89a")),),
    "image/webp": ((0, (b"RIFF",)), (8, (b"WEBP",))),
    "image/avif": ((4, (b"ftypavif", b"ftypavis")),),
}
#: The same and the HEIF family, whose first brand may be a general one.
_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftyp(?:avi[fs]|mif1|msf1)", re.DOTALL
)
#: Bytes that `may_be_picture` needs.
PICTURE_BYTES = 12

#: The first box of HEIF and AVIF files, by its main brand. `mif1` and `msf1` may be either.
_HEIF = re.compile(rb"....ftyp(?:mif1|msf1|avif|avis)", re.DOTALL)
_AVIF_BRANDS = (b"avif", b"avis")
#: Bytes at the start of a file that hold all of its brands.
_BRANDS_BYTES = 64
#: Bytes at the start of a file that are searched for another format's signature.
SIGNATURE_BYTES = 2_048
#: Signatures of formats that are sent as images and not opened here.
_FOREIGN = {
    "a HEIC picture": re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL),
    "a film": re.compile(rb"....ftyp|\x1aE\xdf\xa3", re.DOTALL),
    "a SVG drawing": re.compile(
        rb"(?:<\?xml[^>]{0,500}>\s{0,100})?(?:<!--[^>]{0,500}-->\s{0,100})?(?:<!DOCTYPE svg|<svg)", re.IGNORECASE
    ),
    "an XML text": re.compile(rb"<\?xml", re.IGNORECASE),
    "a web page": re.compile(rb"<(?:!doctype html|html|head|body|script)", re.IGNORECASE),
    "a TIFF picture": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "a BMP picture": re.compile(rb"BM....\0\0\0\0", re.DOTALL),
    "an icon": re.compile(rb"\0\0[\1\2]\0"),
    "a JPEG XL picture": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "a JPEG 2000 picture": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "a PDF document": re.compile(rb"%PDF"),
    "a Photoshop document": re.compile(rb"8BPS"),
}


def media_type(data: bytes) -> str | None:
    """The media type by a file's first bytes; None for formats that the workers do not read."""
    return next((kind for kind, parts in _KINDS.items() if all(data.startswith(one, at) for at, one in parts)), None)


def may_be_picture(head: bytes) -> bool:
    """False if a file's first PICTURE_BYTES cannot be a picture's."""
    return _PICTURE.match(head) is not None


def is_avif(data: bytes) -> bool:
    return bool(_HEIF.match(data)) and any(brand in data[8:_BRANDS_BYTES] for brand in _AVIF_BRANDS)


def foreign(data: bytes) -> str | None:
    """The name of a known format that is not supported, by a file's first bytes; else None."""
    if is_avif(data):
        return None
    data = data[:SIGNATURE_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((name for name, start in _FOREIGN.items() if start.match(data)), None)
