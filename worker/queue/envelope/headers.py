"""What headers and properties a message may have, and what options a signature: the tables, and the headers' check."""

from __future__ import annotations

from typing import Any

from celery.app.task import Context

from tasks.payloads import SUBMITTED_AT
from worker.queue.envelope.bounds import MAX_LINKS, is_plain
from worker.queue.envelope.fields import (
    Check,
    is_address,
    is_any_text,
    is_count,
    is_delay,
    is_due_time,
    is_exchange,
    is_expiry,
    is_flag,
    is_id,
    is_index,
    is_label,
    is_limits,
    is_one_of,
    is_priority,
    is_queue,
    is_retry_policy,
    is_seconds,
)
from worker.queue.envelope.refusal import require, shown


def is_names(value: Any) -> bool:
    """Whether these are names of stamps."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_LINKS
        and all(is_label(name) and name not in _RESERVED_STAMPS for name in value)
    )


def is_custom(value: Any) -> bool:
    """Whether these are a producer's own headers: none has the name of one of Celery's."""
    return isinstance(value, dict) and all(is_label(name) and name not in RESERVED for name in value)


#: Celery's own headers. All but the first two may be null.
HEADERS: dict[str, Check] = {
    "task": lambda value: is_label(value) and value != "",
    "id": is_id,
    "lang": is_label,
    "shadow": is_label,
    "origin": is_label,
    "meth": is_label,
    "eta": is_due_time,
    "expires": is_expiry,
    "group": is_id,
    "group_index": is_index,
    "root_id": is_id,
    "parent_id": is_id,
    "retries": is_count,
    "timelimit": is_limits,
    "argsrepr": is_any_text,
    "kwargsrepr": is_any_text,
    "ignore_result": is_flag,
    "replaced_task_nesting": is_count,
    "stamped_headers": is_names,
    "stamps": is_custom,
    "headers": is_custom,
    "redelivered": is_flag,
    SUBMITTED_AT: is_seconds,
}

#: What Celery overwrites, and what only its first protocol has.
_IGNORED = {"hostname", "correlation_id", "reply_to", "delivery_info", "properties", "args", "kwargs", "utc", "taskset"}

_PROPERTIES: dict[str, Check] = {
    "priority": is_priority,
    "reply_to": is_address,
    "correlation_id": is_address,
}

#: Options of a signature, for the message that is made of it.
OPTIONS: dict[str, Check] = {
    "task_id": is_id,
    "root_id": is_id,
    "parent_id": is_id,
    "group_id": is_id,
    "group_index": is_index,
    "reply_to": is_address,
    "queue": is_queue,
    "routing_key": is_queue,
    "exchange": is_exchange,
    "exchange_type": is_one_of("direct"),
    "priority": is_priority,
    "countdown": is_delay,
    "eta": is_due_time,
    "expires": is_expiry,
    "retries": is_count,
    "max_retries": is_count,
    "interval": is_delay,
    "time_limit": is_seconds,
    "soft_time_limit": is_seconds,
    "ignore_result": is_flag,
    "add_to_parent": is_flag,
    "shadow": is_label,
    "origin": is_label,
    "argsrepr": is_any_text,
    "kwargsrepr": is_any_text,
    "headers": is_custom,
    "serializer": is_one_of("json"),
    "compression": is_one_of("gzip", "zlib", "bzip2"),
    "delivery_mode": is_one_of(1, 2, "transient", "persistent"),
    "retry": is_flag,
    "retry_policy": is_retry_policy,
    "replaced_task_nesting": is_count,
    "stamped_headers": is_names,
}
NESTED = {"link", "link_error", "chain", "chord"}

#: Names that a producer's own headers cannot have: Celery would read them as its own.
RESERVED = frozenset({*HEADERS, *NESTED, *dir(Context), "callbacks", "errbacks"} - {SUBMITTED_AT, "redelivered"})
#: Names that stamps cannot have: they are given to `apply_async` beside its options.
_RESERVED_STAMPS = (
    RESERVED
    | OPTIONS.keys()
    | {
        *("connection", "producer", "publisher", "router", "route_name", "mandatory", "immediate", "task_type", "body"),
        *("result_cls", "content_type", "content_encoding", "timestamp", "expiration", "declare", "now", "timezone"),
        *("create_sent_event", "name", "message", "app", "self", "confirm_timeout", "timeout", "cls"),
        *("event_dispatcher", "delivery_tag", "body_encoding"),
    }
)


def checked_headers(headers: dict[str, Any]) -> dict[str, Any]:
    """The headers that the worker reads, and the producer's own. Raises Refused."""
    require(is_plain(headers), "The headers are too large or nested too deep: put less into them.")
    known: dict[str, Any] = {}
    for name, value in headers.items():
        check = HEADERS.get(name)
        if check is None:
            # A reserved name could replace what Celery reads: a header `chain` would, beside a body without one.
            if value is not None and name not in _IGNORED:
                require(is_label(name) and name not in RESERVED, f"The header {shown(name)} is reserved: rename it.")
                known[name] = value
        elif value is not None or name in ("task", "id"):
            require(check(value), f"The header {name} is not what Celery sends there: send the job with Celery.")
            known[name] = value
    require("id" in known, "The message has no id: send it with Celery.")
    stamps = known.get("stamps") or {}
    require(stamps.keys() >= set(known.get("stamped_headers") or ()), "A stamped header has no stamp: stamp it.")
    return known


def check_properties(properties: dict[str, Any]) -> None:
    """Raises Refused for a property of another form than Celery's."""
    require(is_plain(properties), "The properties are too large or nested too deep: send the job with Celery.")
    for name, check in _PROPERTIES.items():
        value = properties.get(name)
        require(value is None or check(value), f"The property {name} is not what Celery sends: send it with Celery.")
