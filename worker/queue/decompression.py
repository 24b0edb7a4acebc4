"""A compressed message's body, inflated up to the limit of a job's size.

Kombu inflates without a limit: fifty bytes may become fifty megabytes.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from typing import Any

#: By kombu's names: functions that return at most the given number of a compressed body's first bytes.
_INFLATE: dict[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": lambda body, most: zlib.decompressobj().decompress(body, most),
    "application/x-bz2": lambda body, most: bz2.BZ2Decompressor().decompress(body, most),
}
_ALIASES = {"gzip": "application/x-gzip", "zlib": "application/x-gzip", "bzip2": "application/x-bz2"}


def inflated(body: bytes, compression: Any, most: int) -> bytes:
    """A compressed body's first bytes, `most` at most. Raises ValueError with the cure."""
    inflate = _INFLATE.get(_ALIASES.get(compression, compression)) if isinstance(compression, str) else None
    if inflate is None:
        raise ValueError("The compression is not accepted: set task_compression to 'gzip' or 'bzip2', or leave it out.")
    try:
        return inflate(body, most)
    except (ValueError, OSError, EOFError, zlib.error):
        raise ValueError(
            "The body is not compressed as its header `compression` says: compress it so, or leave the header out."
        ) from None
