"""Bounds on what a message may hold. They are checked before memory or time is spent on more."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from kombu.utils.json import object_hook

from worker.queue.envelope.errors import UNREADABLE, MessageRefused, require

#: Characters of an id, and of the other texts in headers.
MAX_ID_CHARS = 1_024
MAX_LABEL_CHARS = 255
#: Characters, entries and depth of all headers together. Tracing libraries add a few kilobytes.
MAX_HEADER_CHARS, MAX_HEADER_VALUES, HEADER_DEPTH = 100_000, 2_000, 16
#: Entries and depth of a body. Metadata may be 32 deep, and canvases are nested.
MAX_VALUES, BODY_DEPTH = 100_000, 100
#: Commas and brackets of a body's text: decoding more takes memory before anything can be counted.
MAX_MARKS = 500_000
#: Signatures in one message: its links, error links, chain and chord with all that is nested in them.
MAX_LINKS = 100
#: Seconds from now to the latest due time.
MAX_DELAY_S = 31 * 86_400
#: Unix seconds of the latest expiry: the year 3000.
MAX_EXPIRY = 32_503_680_000
MAX_RETRIES = 1_000
#: Digits and exponent of a decimal number in a body.
MAX_DECIMAL = 400


def decoded(body: bytes) -> Any:
    """A body's JSON, with the values that kombu gives a type. Raises MessageRefused."""
    if marks(body) > MAX_MARKS:
        raise MessageRefused(f"The body has more than {MAX_VALUES:,} values: send fewer.")
    try:
        payload = json.loads(body.decode(), object_hook=_typed)
    except MessageRefused:
        raise
    except (ValueError, RecursionError):
        raise MessageRefused(UNREADABLE) from None
    why = f"The body has more than {MAX_VALUES:,} values, or is nested more than {BODY_DEPTH} deep: send less."
    require(is_within(payload, values=MAX_VALUES, depth=BODY_DEPTH), why)
    return payload


def marks(body: bytes) -> int:
    """An upper bound on the number of values in a body of JSON."""
    return sum(map(body.count, (b",", b"[", b"{")))


def _typed(value: dict[str, Any]) -> Any:
    """A JSON object, or the date, number, UUID or bytes that kombu writes as one. Raises MessageRefused."""
    if value.keys() != {"__type__", "__value__"}:
        return value
    try:
        typed = object_hook(value)
        if isinstance(typed, Decimal) and _is_huge(typed):
            raise ValueError
    except Exception:
        raise MessageRefused("A value with a `__type__` cannot be read: send it as plain JSON.") from None
    return typed


def _is_huge(number: Decimal) -> bool:
    """True for a number that takes minutes and gigabytes to become an integer; NaN and infinity never do."""
    return not number.is_finite() or len(number.as_tuple().digits) > MAX_DECIMAL or abs(number.adjusted()) > MAX_DECIMAL


def is_within(value: Any, *, values: int, depth: int, chars: float = math.inf) -> bool:
    """Whether a JSON value has at most these values, levels and characters. Stops reading at the first excess."""
    level = [value]
    for _ in range(depth + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                chars -= len(each)
            elif isinstance(each, dict):
                below += each.values()
                chars -= sum(map(len, each))
            elif isinstance(each, list):
                below += each
        values -= len(below)
        if not below or values < 0 or chars < 0:
            return values >= 0 and chars >= 0
        level = below
    return False


def is_plain(value: Any) -> bool:
    """Whether headers, properties or a stamp are within their bounds."""
    return is_within(value, values=MAX_HEADER_VALUES, depth=HEADER_DEPTH, chars=MAX_HEADER_CHARS)
