"""A producer's own pictures, as `data:` URIs.

    Caption(image=Image.from_file("cat.jpg"))
    Caption(image=Image.from_bytes(request.files["photo"].read(), max_side=1024))

A `pathlib.Path`, `bytes`, an open file, an upload (Django's, FastAPI's) or a Pillow image may also stand where a
payload takes an image: it is read then.
"""

from __future__ import annotations

import base64
import inspect
import io
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .errors import ConfigurationError, ImageInvalid, ImageTooLarge
from .picture_forms import PICTURE_FORMS, media_type

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

#: Bytes that are too many for any job as base64, with any settings of the workers.
MAX_BYTES = 200_000_000
JPEG_QUALITY = 92


class Readable(Protocol):
    """An open file, or an upload: Django's, FastAPI's."""

    def read(self, size: int = ..., /) -> bytes | Awaitable[bytes]: ...


class PillowImage(Protocol):
    """Pillow's own class, which need not be installed."""

    def getbands(self) -> tuple[str, ...]: ...

    def tobytes(self) -> bytes: ...


#: Objects that a picture can be read from.
AtHand: TypeAlias = bytes | bytearray | memoryview | os.PathLike[str] | Readable | PillowImage


class Image:
    """Makes a payload's image from a picture. As a field's type in your models it accepts what a payload accepts."""

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview, *, max_side: int | None = None) -> str:
        """A picture's file as a `data:` URI. `max_side`: scale down to this many pixels, which needs Pillow.

        Raises ImageInvalid for formats that the workers do not read; with `max_side`, for those that Pillow does not
        read.
        """
        content = bytes(data)
        if max_side is not None:
            content = _scaled(content, max_side)
        kind = media_type(content)
        if kind is None:
            raise ImageInvalid(
                f"The bytes are not a {PICTURE_FORMS} picture: send it in one of these forms.", detail="not_a_picture"
            )
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    @staticmethod
    def from_file(file: str | AtHand, *, max_side: int | None = None) -> str:
        """A picture's file, by its path or open, as a `data:` URI; see `from_bytes`. Read from its beginning.

        Raises ImageInvalid if it cannot be read.
        """
        return Image.from_bytes(_content(Path(file) if isinstance(file, str) else file), max_side=max_side)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from .payload_fields import ImageSource

        return handler.generate_schema(ImageSource)


def is_at_hand(value: Any) -> bool:
    """Whether a value is a picture object; JSON values never are."""
    if isinstance(value, str | dict):
        return False
    is_file = isinstance(value, os.PathLike) or hasattr(value, "read")
    return is_file or isinstance(value, bytes | bytearray | memoryview) or _is_pillows(value)


def _is_pillows(value: Any) -> bool:
    return hasattr(value, "tobytes") and hasattr(value, "getbands") and hasattr(value, "save")


def _content(source: Any) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if _is_pillows(source):
        return _saved(source, "PNG")
    try:
        content = _of_path(source) if isinstance(source, os.PathLike) else _of_file(source)
    except (OSError, ValueError) as error:
        # Django's field without a file raises ValueError.
        problem = error.strerror if isinstance(error, OSError) else error
        raise ImageInvalid(f"The picture's file cannot be read ({problem}): check it.", detail="no_file") from None
    if not isinstance(content, bytes):
        raise ImageInvalid("The picture's file is open as text: open it in binary mode.", detail="no_file")
    if len(content) > MAX_BYTES:
        raise ImageTooLarge(f"The picture has more than {MAX_BYTES:,} bytes: send it by URL.", detail="bytes")
    return content


def _of_path(path: os.PathLike[str]) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _of_file(file: Any) -> Any:
    if inspect.iscoroutinefunction(getattr(file, "read", None)):
        # FastAPI's upload wraps a plain file.
        file = file.file
    was_closed = getattr(file, "closed", False)
    if callable(getattr(file, "open", None)):
        # Django's field may be closed, or at its end after it was saved.
        file.open()
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
    try:
        return file.read(MAX_BYTES + 1)
    finally:
        if was_closed:
            file.close()


def _scaled(content: bytes, max_side: int) -> bytes:
    try:
        from PIL import Image as Pillow
        from PIL import ImageOps
    except ImportError:
        raise ConfigurationError(
            "max_side needs Pillow: install it (pip install pillow), or leave max_side out."
        ) from None
    if max_side < 1:
        raise ConfigurationError("max_side is the pixels of the longer side: 1 or more.")
    try:
        with Pillow.open(io.BytesIO(content)) as image:
            if max(image.size) <= max_side and media_type(content):
                return content
            image.draft("RGB", (max_side, max_side))
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P" or upright.mode.startswith("I"):
                # Scaling palette indices would produce wrong colours.
                upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            upright.thumbnail((max_side, max_side), Pillow.Resampling.LANCZOS)
            is_clear = upright.has_transparency_data
            return _saved(upright.convert("RGBA" if is_clear else "RGB"), "PNG" if is_clear else "JPEG")
    except Pillow.DecompressionBombError:
        raise ImageTooLarge("The picture has too many pixels to be scaled down.", detail="pixels") from None
    except (OSError, ValueError, SyntaxError):
        raise ImageInvalid("The picture cannot be read: send another file.", detail="decode") from None


def _saved(image: Any, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **({"quality": JPEG_QUALITY} if form == "JPEG" else {}))
    return file.getvalue()
