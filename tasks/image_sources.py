"""Normalizes an image's URL to the one form that the workers take. Pure."""

from __future__ import annotations

import binascii
import re
from contextlib import suppress
from pathlib import PurePosixPath
from urllib.parse import unquote_to_bytes

from .errors import ImageBlocked, ImageInvalid
from .picture_forms import PICTURE_FORMS, foreign, may_be_picture
from .urls import fault_of

FORMS = 'an image is an http(s) URL, a data:image/...;base64, URI or {"path": "a/b.jpg"}'
#: Characters before the comma of a data: URI.
MAX_HEAD_CHARS = 1_000
#: Characters of base64 that are checked here. The worker, which decodes everything, finds later errors.
MAX_CHECKED_CHARS = 100_000
#: Dropped from base64 before it is read.
BLANKS = b" \t\n\r\f"

#: Stripped from both ends of copied text: blanks of any script, byte order marks, zero-width characters.
_OUTER = "".join(map(chr, (*range(0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2010), *range(0x2028, 0x2030)))) + (
    "\u205f\u2060\u3000\ufeff"
)
_WEB = re.compile(r"https?://", re.IGNORECASE)
#: Characters that URL parsers drop anywhere.
_LINE_ENDS = str.maketrans("", "", "\t\r\n")
_HOST = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_DATA_IMAGE = re.compile(r"data:image/", re.IGNORECASE)
_DATA_TYPE = re.compile(r"data:(?:image/[\w.+-]{1,100}|(?:application|binary)/octet-stream)", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)
_PICTURE_NAME = re.compile(r"\.(?:jpe?g|png|webp|gif|avif|heic|bmp|tiff?|svg)\Z", re.IGNORECASE)
#: How base64 of JPEG, PNG, GIF and WebP files begins.
_BARE_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{40,}")


def image_url(text: str) -> str:
    """The normalized URL of a text, checked without the network and the worker's settings.

    Raises ImageBlocked for an unsupported URL, ImageInvalid for data other than a picture, ValueError for other texts.
    """
    text = text.strip(_OUTER)
    if _WEB.match(text):
        return _web_url(text.translate(_LINE_ENDS))
    if text[:5].lower() == "data:":
        start = data_head(text)
        if start is None:
            raise ImageBlocked(
                "Of data: URIs only data:image/...;base64, is read: send the image in this form.", detail="data_uri"
            )
        _check_picture(_beginning(text, start))
        return text
    if _SCHEME.match(text):
        raise ImageBlocked(
            "An image is an http(s) URL or a data:image/...;base64, URI: no other scheme is read.", detail="scheme"
        )
    if _BARE_BASE64.match(text):
        raise ValueError("the image is base64 without its beginning: write data:image/jpeg;base64, in front")
    raise ValueError(FORMS)


def is_meant_as_image(text: str) -> bool:
    """True for a text that is entirely an image's URL or data, valid or not; it must not be read as text."""
    text = text.strip(_OUTER)
    if _DATA_IMAGE.match(text) or _BARE_BASE64.fullmatch(text) or data_head(text) is not None:
        return True
    if not _SCHEME.match(text) or "://" not in text[:40]:
        return False
    is_one_word = not any(map(str.isspace, text.translate(_LINE_ENDS)))
    path = text.partition("#")[0].partition("?")[0]
    if _WEB.match(text):
        # A sentence may begin with a URL; a file's name may have blanks, and ends in a picture's suffix.
        return is_one_word or ("\n" not in text and _PICTURE_NAME.search(path) is not None)
    return is_one_word and _PICTURE_NAME.search(path) is not None


def data_head(uri: str) -> int | None:
    """The index of a data: URI's base64; None if it is not an image's. Parameters and blanks may stand before it."""
    comma = uri.find(",", 0, MAX_HEAD_CHARS)
    if comma < 0:
        return None
    form, *parameters = uri[:comma].split(";")
    if not _DATA_TYPE.fullmatch(form.strip()) or not parameters or parameters[-1].strip().lower() != "base64":
        return None
    return comma + 1


def _beginning(uri: str, start: int) -> bytes:
    """A data: URI's first bytes. Raises ImageInvalid."""
    text = uri[start : start + MAX_CHECKED_CHARS]
    try:
        if len(uri) - start <= MAX_CHECKED_CHARS:
            return base64_bytes(text)
        plain = _plain_base64(text.rpartition("%")[0] if "%" in text[-2:] else text).partition(b"=")[0]
        return binascii.a2b_base64(plain[: len(plain) // 4 * 4], strict_mode=True)
    except ValueError:
        raise ImageInvalid(
            "The data: URI is not valid base64: encode the image's bytes anew.", detail="data_uri"
        ) from None


def base64_bytes(text: str) -> bytes:
    """Decode base64 as WHATWG's "forgiving-base64 decode", percent-encoded too. Raises ValueError."""
    with suppress(ValueError):
        return binascii.a2b_base64(text, strict_mode=True)
    plain = _plain_base64(text)
    if len(plain) % 4 == 0:
        # At most two; a further one is not a base64 character.
        plain = plain.removesuffix(b"=").removesuffix(b"=")
    if len(plain) % 4 == 1 or b"=" in plain:
        raise ValueError("no base64")
    return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)


def _plain_base64(text: str) -> bytes:
    """Decode base64 without blanks and escapes."""
    plain = text.encode("ascii")
    if b"%" in plain:
        plain = unquote_to_bytes(plain)
    return plain.translate(None, BLANKS)


def _check_picture(data: bytes) -> None:
    """Raises ImageInvalid for a file that does not begin as a picture."""
    kind = foreign(data)
    if kind or not may_be_picture(data):
        raise ImageInvalid(f"The image is {kind or 'no picture'}: send {PICTURE_FORMS}.", detail="not_a_picture")


def is_inner_path(path: str) -> bool:
    """Whether an image's path stays below the root, without regard to links."""
    parts = PurePosixPath(path).parts
    return bool(parts) and parts[0] != "/" and parts[0] != "//" and ".." not in parts and "\0" not in path


def _web_url(url: str) -> str:
    host = _HOST.match(url)
    end = host.end() if host else 0
    if " " in url[:end]:
        raise ValueError("the image's URL has a blank in its host: write http(s)://host/path")
    url = url[:end] + url[end:].replace(" ", "%20")
    if fault := fault_of(url):
        told, detail = fault
        raise ImageBlocked(f"{told}.", detail=detail)
    return url
