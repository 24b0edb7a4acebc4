"""A compressed message's body, inflated no further than a job may be long.

Kombu inflates before anybody can ask how far: fifty bytes become fifty megabytes.
"""

from __future__ import annotations

import base64
import bz2
import zlib
from collections.abc import Callable
from typing import Any

#: By kombu's names: what gives a compressed body's first bytes, so many at most. Others are read as they are, which is
#: no JSON: their jobs are refused.
_INFLATE: dict[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": lambda body, most: zlib.decompressobj().decompress(body, most),
    "application/x-bz2": lambda body, most: bz2.BZ2Decompressor().decompress(body, most),
}
_ALIASES = {"gzip": "application/x-gzip", "zlib": "application/x-gzip", "bzip2": "application/x-bz2"}


def inflated(message: dict[str, Any], most: int) -> dict[str, Any]:
    """A message as kombu keeps it, no longer compressed. Of a body of more than `most` bytes there is one byte more."""
    headers = message.get("headers")
    if not isinstance(headers, dict) or not headers.get("compression"):
        return message
    name = str(headers["compression"])
    properties = {**message["properties"], "body_encoding": None}
    return {
        **message,
        "body": _body(message, _INFLATE.get(_ALIASES.get(name, name)), most + 1),
        "headers": {key: value for key, value in headers.items() if key != "compression"},
        "properties": properties,
    }


def _body(message: dict[str, Any], inflate: Callable[[bytes, int], bytes] | None, most: int) -> bytes:
    body = message["body"]
    raw = body.encode() if isinstance(body, str) else bytes(body)
    try:
        if message["properties"].get("body_encoding") == "base64":
            raw = base64.b64decode(raw)
        return inflate(raw, most) if inflate else raw
    except (ValueError, OSError, EOFError, zlib.error):
        return raw
