"""A compressed message's body, inflated no further than a job may be long.

Kombu inflates before anybody can ask how far: fifty bytes become fifty megabytes.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from typing import Any

#: By kombu's names: what gives a compressed body's first bytes, so many at most.
_INFLATE: dict[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": lambda body, most: zlib.decompressobj().decompress(body, most),
    "application/x-bz2": lambda body, most: bz2.BZ2Decompressor().decompress(body, most),
}
_ALIASES = {"gzip": "application/x-gzip", "zlib": "application/x-gzip", "bzip2": "application/x-bz2"}


def inflated(body: bytes, compression: Any, most: int) -> bytes:
    """A compressed body's first bytes, `most` at most. Raises ValueError with a sentence that tells the cure."""
    inflate = _INFLATE.get(_ALIASES.get(compression, compression)) if isinstance(compression, str) else None
    if inflate is None:
        raise ValueError("The compression is not accepted: set task_compression to 'gzip' or 'bzip2', or leave it out.")
    try:
        return inflate(body, most)
    except (ValueError, OSError, EOFError, zlib.error):
        raise ValueError(
            "The body is not compressed as its header `compression` says: compress it so, or leave the header out."
        ) from None
