"""Tables of a message's headers and properties and of a signature's options, and the check of the headers."""

from __future__ import annotations

from typing import Any

from celery.app.task import Context

from tasks.protocol import CONTINUES, RUN, SUBMITTED_AT
from worker.queue.envelope import forms
from worker.queue.envelope.bounds import MAX_LINKS, is_plain
from worker.queue.envelope.errors import require, shown
from worker.queue.envelope.fields import is_label, with_offset
from worker.queue.envelope.forms import Form


def is_names(value: Any) -> bool:
    """Whether these are names of stamps."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_LINKS
        and all(is_label(name) and name not in _RESERVED_STAMPS for name in value)
    )


def is_custom(value: Any) -> bool:
    """Whether these are a producer's own headers, without a name of Celery's."""
    return isinstance(value, dict) and all(is_label(name) and name not in RESERVED for name in value)


_NAMES = Form(is_names, f"a list of at most {MAX_LINKS} names, without Celery's own")
_CUSTOM = Form(is_custom, "an object without Celery's own names")

#: Celery's own headers. All but the first two may be null.
HEADERS: dict[str, Form] = {
    "task": forms.TASK,
    "id": forms.ID,
    "lang": forms.LABEL,
    "shadow": forms.LABEL,
    "origin": forms.LABEL,
    "meth": forms.LABEL,
    "eta": forms.DUE_TIME,
    "expires": forms.MOMENT,
    "group": forms.ID,
    "group_index": forms.INDEX,
    "root_id": forms.ID,
    "parent_id": forms.ID,
    "retries": forms.COUNT,
    "timelimit": forms.LIMITS,
    "argsrepr": forms.TEXT,
    "kwargsrepr": forms.TEXT,
    "ignore_result": forms.FLAG,
    "replaced_task_nesting": forms.COUNT,
    "stamped_headers": _NAMES,
    "stamps": _CUSTOM,
    "headers": _CUSTOM,
    "redelivered": forms.FLAG,
    SUBMITTED_AT: forms.UNIX_SECONDS,
    CONTINUES: forms.FLAG,
    RUN: forms.COUNT,
}

_MOMENTS = (forms.DUE_TIME, forms.MOMENT)
#: Headers that Celery overwrites, or that only its first protocol has.
_IGNORED = {"hostname", "correlation_id", "reply_to", "delivery_info", "properties", "args", "kwargs", "utc", "taskset"}

_PROPERTIES: dict[str, Form] = {
    "priority": forms.PRIORITY,
    "reply_to": forms.ADDRESS,
    "correlation_id": forms.ADDRESS,
}

#: Options of a signature, for the message that is made of it.
OPTIONS: dict[str, Form] = {
    "task_id": forms.ID,
    "root_id": forms.ID,
    "parent_id": forms.ID,
    "group_id": forms.ID,
    "group_index": forms.INDEX,
    "reply_to": forms.ADDRESS,
    "queue": forms.QUEUE,
    "routing_key": forms.QUEUE,
    "exchange": forms.EXCHANGE,
    "exchange_type": forms.one_of("direct"),
    "priority": forms.PRIORITY,
    "countdown": forms.DELAY,
    "eta": forms.DUE_TIME,
    "expires": forms.EXPIRY,
    "retries": forms.COUNT,
    "max_retries": forms.COUNT,
    "interval": forms.DELAY,
    "time_limit": forms.SECONDS,
    "soft_time_limit": forms.SECONDS,
    "ignore_result": forms.FLAG,
    "add_to_parent": forms.FLAG,
    "shadow": forms.LABEL,
    "origin": forms.LABEL,
    "argsrepr": forms.TEXT,
    "kwargsrepr": forms.TEXT,
    "headers": _CUSTOM,
    "serializer": forms.one_of("json"),
    "compression": forms.one_of("gzip", "zlib", "bzip2"),
    "delivery_mode": forms.one_of(1, 2, "transient", "persistent"),
    "retry": forms.FLAG,
    "retry_policy": forms.RETRY_POLICY,
    "replaced_task_nesting": forms.COUNT,
    "stamped_headers": _NAMES,
}
NESTED = {"link", "link_error", "chain", "chord"}

#: Names that a producer's own headers cannot have: Celery would read them as its own.
RESERVED = frozenset(
    {*HEADERS, *NESTED, *dir(Context), "callbacks", "errbacks"} - {SUBMITTED_AT, CONTINUES, RUN, "redelivered"}
)
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
    """The headers that the worker reads, and the producer's own. Raises MessageRefused."""
    require(is_plain(headers), "The headers are too large or nested too deep: put less into them.")
    known: dict[str, Any] = {}
    for name, value in headers.items():
        form = HEADERS.get(name)
        if form is None:
            # A reserved name could replace what Celery reads: a header `chain` would, beside a body without one.
            if value is not None and name not in _IGNORED:
                require(is_label(name) and name not in RESERVED, f"The header {shown(name)} is reserved: rename it.")
                known[name] = value
        elif value is not None or name in ("task", "id"):
            require(form.holds(value), f"The header {name} must be {form.words}.")
            known[name] = with_offset(value) if form in _MOMENTS and value is not None else value
    require("id" in known, "The message has no id: send the header id, a new UUID for each job.")
    stamps = known.get("stamps") or {}
    require(stamps.keys() >= set(known.get("stamped_headers") or ()), "A stamped header has no stamp: stamp it.")
    return known


def check_properties(properties: dict[str, Any]) -> None:
    """Raises MessageRefused for a property of another form than Celery's."""
    require(is_plain(properties), "The properties are too large or nested too deep: put less into them.")
    for name, form in _PROPERTIES.items():
        value = properties.get(name)
        require(value is None or form.holds(value), f"The property {name} must be {form.words}.")
