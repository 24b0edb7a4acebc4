"""Types of the values in headers, properties and signatures: predicates that look at one value."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

from celery.utils.time import maybe_iso8601, maybe_make_aware

from tasks.protocol import QUEUE
from tasks.redis_keys import is_no_queue
from worker.queue.envelope.bounds import MAX_DELAY_S, MAX_EXPIRY, MAX_ID_CHARS, MAX_LABEL_CHARS, MAX_RETRIES

Check = Callable[[Any], bool]
_PRINTABLE_ASCII = re.compile(r"[ -~]+")
_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@/+-]{0,254}")


def is_text(value: str) -> bool:
    """True without lone surrogates: a Python string may hold them, and UTF-8 cannot encode them."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def usable_id(id: Any) -> str | None:
    """An id under which a result can be stored, even if no job may have it; None for anything else."""
    return id if isinstance(id, str) and 0 < len(id) <= MAX_ID_CHARS and is_text(id) else None


def is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_ID_CHARS and _PRINTABLE_ASCII.fullmatch(value) is not None


def is_label(value: Any) -> bool:
    """A text for one line of a log: no control characters, none that change the direction of writing."""
    return isinstance(value, str) and len(value) <= MAX_LABEL_CHARS and value.isprintable()


def is_any_text(value: Any) -> bool:
    return isinstance(value, str) and is_text(value)


def is_address(value: Any) -> bool:
    return value == "" or is_id(value)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool | int) and value in (0, 1)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < MAX_RETRIES


def is_index(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def is_priority(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= MAX_EXPIRY


def is_delay(value: Any) -> bool:
    return isinstance(value, int | float) and -MAX_DELAY_S <= value <= MAX_DELAY_S


def is_limits(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(each is None or is_seconds(each) for each in value)


def is_due_time(value: Any) -> bool:
    return 0 <= unix_seconds(value) <= time.time() + MAX_DELAY_S


def is_moment(value: Any) -> bool:
    return 0 <= unix_seconds(value) <= MAX_EXPIRY


def is_expiry(value: Any) -> bool:
    return is_seconds(value) or is_moment(value)


def unix_seconds(value: Any) -> float:
    """The unix seconds of a moment as Celery writes it; NaN for anything else."""
    if not isinstance(value, str | datetime):
        return math.nan
    try:
        moment = maybe_make_aware(maybe_iso8601(value))
        # Raises for years near 1 and near 9999.
        return cast(float, moment.timestamp())
    except Exception:
        return math.nan


def with_offset(value: Any) -> Any:
    """A moment that Celery wrote, with an offset where it has none: as Celery's producers, we read it as UTC then.

    Celery's worker would compare an expiry without an offset to its own local time.
    """
    moment = maybe_iso8601(value)
    return value if moment.tzinfo is not None else maybe_make_aware(moment).isoformat()


def is_queue(value: Any) -> bool:
    return isinstance(value, str) and bool(_QUEUE.fullmatch(value)) and not is_no_queue(value)


def is_exchange(value: Any) -> bool:
    # The bindings of our queue's exchange are a set in Redis that producers write to.
    return value == "" or (is_queue(value) and value != QUEUE)


def is_retry_policy(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in ("max_retries", "interval_start", "interval_step", "interval_max")
        and isinstance(each, int | float)
        and 0 <= each <= 100
        for name, each in value.items()
    )


def is_one_of(*values: Any) -> Check:
    return lambda value: isinstance(value, str | int) and value in values
