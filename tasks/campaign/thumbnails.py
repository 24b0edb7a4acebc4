"""Small copies of pictures, as `data:` URIs for a page that loads nothing.

Pillow decodes the picture and encodes the copy, so that nothing of a stranger's file gets into the page but its colors.
"""

from __future__ import annotations

import base64
import io
import time
from http.client import HTTPException
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from ..errors import ConfigurationError
from ..image_sources import base64_bytes, data_head

#: Pixels of the longer side.
SIDE = 192
QUALITY = 60
#: A picture with more pixels is not decoded: it would take seconds.
MAX_PIXELS = 60_000_000
#: A picture's file with more bytes is not read.
MAX_BYTES = 50_000_000
#: Seconds for a download, and for each answer of its server.
FETCH_S, SILENCE_S = 20.0, 10.0
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
_CHUNK = 1 << 16


def check_pillow() -> None:
    """Raises ConfigurationError, with the cure, where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigurationError("Thumbnails need Pillow: install it (pip install pillow).") from None


def thumbnail(content: bytes) -> str | None:
    """A small copy of a picture's file; None if it cannot be decoded."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (SIDE, SIDE))
            upright = ImageOps.exif_transpose(image)
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            upright.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
            file = io.BytesIO()
            upright.save(file, "WEBP", quality=QUALITY, method=2)
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError, KeyError, MemoryError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def data_uri_bytes(uri: str) -> bytes | None:
    """The picture's file in a `data:` URI; None if there is none."""
    start = data_head(uri)
    if start is None or len(uri) > MAX_BYTES * 3 // 2:
        return None
    try:
        return base64_bytes(uri[start:])
    except ValueError:
        return None


def is_web(address: str) -> bool:
    """Whether a text is an http(s) address."""
    return address[:8].lower().startswith(("http://", "https://"))


def fetched(address: str) -> bytes | None:
    """A picture's file from the web; None if it does not come. Asks any host that the address or a redirect names."""
    end = time.monotonic() + FETCH_S
    try:
        # No handler for files or FTP: a redirect cannot lead there.
        with _opener().open(Request(address, headers={"User-Agent": "idefics-jobs"}), timeout=SILENCE_S) as response:  # noqa: S310 # nosec B310
            content = bytearray()
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > MAX_BYTES or time.monotonic() > end:
                    return None
    except (HTTPException, OSError, ValueError):
        return None
    return bytes(content)


def _opener() -> OpenerDirector:
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(), HTTPHandler(), HTTPSHandler(), HTTPRedirectHandler(), HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
