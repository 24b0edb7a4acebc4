"""Pictures as files and data URIs."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

Colour = str | tuple[int, int, int]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file; `options` are Pillow's."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(colour: Colour = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG file of one colour."""
    return encoded(Image.new("RGB", size, colour))


def data_uri(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"
