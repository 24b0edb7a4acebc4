"""A message of the queue: anybody's bytes become a checked envelope, or a refusal that tells the cure.

`opened` reads the outer JSON, as kombu writes it. `checked` reads a job in it: headers, body and links, in the forms
that Celery's own producers send. Both are pure, and raise nothing but Refused, RecursionError and MemoryError included.

What is checked here is not checked again: Celery's tracer, the pool and the engine compute with it. Nested signatures
(links, error links, chains and chords) are checked as strictly as the job, because the worker publishes them.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, cast

from celery.app.task import Context
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.utils.json import object_hook
from kombu.utils.uuid import uuid

from tasks.payloads import QUEUE, SUBMITTED_AT
from worker.queue.decompression import inflated

#: How kombu's messages begin.
_BODY = b'{"body": "'

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

NO_ENVELOPE = "The message is no envelope of Celery's: send it with Celery."
UNREADABLE = "The message cannot be decoded: send JSON, as Celery's serializer 'json' does."
NO_TASK = "The message is no task of Celery's: send it with Celery."
NO_BODY = "The body is not [args, kwargs, links]: send a list of arguments and an object of keyword arguments."
#: By the content type that the message has instead of JSON's.
_SERIALIZERS = {
    "application/x-python-serialize": "pickle",
    "application/x-yaml": "yaml",
    "application/x-msgpack": "msgpack",
}


class Refused(Exception):
    """A message that is no job. The text tells its sender the cure and repeats nothing of the message."""

    def __init__(self, why: str, id: str | None = None) -> None:
        super().__init__(why)
        #: The job's, where one is known: it ends as `invalid_request`.
        self.id = id


@dataclass(frozen=True, slots=True)
class Envelope:
    """A job's message in Celery's second protocol, in which all that the worker reads has its type."""

    headers: dict[str, Any]
    #: JSON: positional arguments, keyword arguments, links.
    body: bytes
    #: The same, decoded.
    payload: tuple[Any, Any, Any]


# --- The outer JSON -------------------------------------------------------------------------------


def opened(raw: bytes, queue: str, most_bytes: int) -> dict[str, Any]:
    """A message as kombu delivers it, its body decoded and no longer compressed. Raises Refused.

    It says that it came from `queue`, wherever it claims to have been sent: retries go there. Of a body that inflates
    to more than `most_bytes` there is one byte more.
    """
    message: Any = None
    try:
        message = _outer(raw)
        return _delivered(message, queue, most_bytes)
    except Refused as refused:
        raise Refused(str(refused), refused.id or _known_id(message)) from None
    except Exception:
        raise Refused(NO_ENVELOPE, _known_id(message)) from None


def _outer(raw: bytes) -> Any:
    """Kombu writes the body first: megabytes need not be read as JSON, a character at a time, where they are base64."""
    end = raw.find(b'"', len(_BODY)) if raw.startswith(_BODY) else -1
    body = raw[len(_BODY) : end]
    if end < 0 or b"\\" in body:
        # Not kombu's own decoder: its typed values raise anything.
        return json.loads(raw.decode())
    return {**json.loads((_BODY + raw[end:]).decode()), "body": body}


def _delivered(message: dict[str, Any], queue: str, most_bytes: int) -> dict[str, Any]:
    headers = message.get("headers") or {}
    properties = message["properties"]
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise Refused(NO_ENVELOPE)
    body, compression = _decoded_body(message["body"], properties.get("body_encoding")), headers.get("compression")
    if compression:
        headers = {name: value for name, value in headers.items() if name != "compression"}
        try:
            body = inflated(body, compression, most_bytes + 1)
        except ValueError as error:
            raise Refused(str(error)) from None
    tag = properties.get("delivery_tag")
    came = properties.get("delivery_info")
    is_again = headers.get("redelivered") is True or (isinstance(came, dict) and came.get("redelivered") is True)
    return {
        "body": body,
        "content-type": message.get("content-type"),
        "content-encoding": message.get("content-encoding"),
        "headers": headers,
        "properties": {
            **properties,
            "body_encoding": None,
            "delivery_tag": tag if isinstance(tag, str) and _is_text(tag) else uuid(),
            "delivery_info": {"exchange": "", "routing_key": queue, **({"redelivered": True} if is_again else {})},
        },
    }


def _decoded_body(body: Any, encoding: Any) -> bytes:
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, bytes) or encoding not in (None, "base64", "utf-8"):
        raise Refused(NO_ENVELOPE)
    return base64.b64decode(body) if encoding == "base64" else body


def given_back(record: bytes) -> tuple[dict[str, Any], str, str]:
    """A message that was taken and goes back to its queue, its exchange and routing key. Raises Refused.

    `record` is kombu's, of the hash with messages that are not acknowledged.
    """
    message: Any = None
    try:
        # Not kombu's own decoder: its typed values raise anything.
        message, exchange, routing_key = json.loads(record.decode())
        headers, properties = message["headers"], message["properties"]
        came = properties.get("delivery_info")
        for part in (headers, came):
            if isinstance(part, dict):
                part["redelivered"] = True
        if all(isinstance(each, str) and _is_text(each) for each in (exchange, routing_key)):
            return message, exchange, routing_key
    except Exception:
        message = message if isinstance(message, dict) else None
    raise Refused(NO_ENVELOPE, _known_id(message))


def returned_job(message: dict[str, Any]) -> tuple[str, int] | None:
    """The id and the retries of a message that `given_back` has read; None where it says none."""
    headers, properties = message.get("headers"), message.get("properties")
    said: dict[str, Any] = headers if isinstance(headers, dict) else {}
    # Celery's first protocol has the id in the body, and in this property too.
    id = usable_id(said.get("id")) or usable_id(properties.get("correlation_id") if properties else None)
    retries = said.get("retries")
    return (id, int(retries) if retries is not None and _is_count(retries) else 0) if id else None


def _known_id(message: Any) -> str | None:
    headers = message.get("headers") if isinstance(message, dict) else None
    return usable_id(headers.get("id")) if isinstance(headers, dict) else None


def usable_id(id: Any) -> str | None:
    """An id under which a result can be stored, whether a job may have it or not."""
    return id if isinstance(id, str) and 0 < len(id) <= MAX_ID_CHARS and _is_text(id) else None


# --- A job ----------------------------------------------------------------------------------------


def checked(message: Any, most_bytes: int) -> Envelope:
    """The job in one of kombu's messages. Raises Refused."""
    ids = [usable_id(message.headers.get("id"))] if isinstance(message.headers, dict) else []
    try:
        return _checked(message, most_bytes, ids)
    except Refused as refused:
        why = str(refused)
    except Exception:
        why = UNREADABLE
    raise Refused(why, next(filter(None, ids), None) or _id_of_first_protocol(message))


def _id_of_first_protocol(message: Any) -> str | None:
    """Of a body that is refused before its id is known: for a value of its, or for the message's content type."""
    body, headers = message.body, message.headers
    if not isinstance(body, bytes) or not isinstance(headers, dict) or "id" in headers or _marks(body) > MAX_MARKS:
        return None
    try:
        said = json.loads(body.decode())
        return usable_id(said.get("id")) if isinstance(said, dict) else None
    except Exception:
        return None


def _checked(message: Any, most_bytes: int, ids: list[str | None]) -> Envelope:
    headers, properties = message.headers, message.properties
    _require(isinstance(headers, dict) and isinstance(properties, dict), NO_ENVELOPE)
    body = message.body if isinstance(message.body, bytes) else str(message.body or "").encode()
    # Not even decoded, so its links and its chord stay unknown.
    _require(
        len(body) <= most_bytes, f"The job has {len(body):,} bytes and this worker takes {most_bytes:,}: send URLs."
    )
    _check_content(message.content_type, message.content_encoding)
    payload = _decoded(body)
    if isinstance(payload, dict):
        # Celery's first protocol says in the body what the second says in headers. Some producers mix both.
        ids.append(usable_id(payload.get("id")))
        headers, parts = _of_first_protocol(headers, payload)
        # The values that kombu gives a type to stay as they are written.
        written = json.loads(body)
        body = json.dumps(_of_first_protocol({}, written)[1]).encode()
        payload = parts
    _require("task" in headers, NO_TASK)
    _require(isinstance(payload, list) and len(payload) == 3, NO_BODY)
    args, kwargs, embed = payload
    _require(isinstance(args, list) and isinstance(kwargs, dict), NO_BODY)
    headers = _checked_headers(headers)
    _check_properties(properties)
    _check_embed(embed)
    return Envelope(headers, body, (args, kwargs, embed))


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise Refused(why)


def _check_content(kind: Any, encoding: Any) -> None:
    if kind != "application/json":
        name = _SERIALIZERS.get(kind, "another content type") if isinstance(kind, str) else "another content type"
        raise Refused(f"{name} is not accepted: set task_serializer='json'.")
    # Python decodes with any codec that is named here, decompressors among them.
    is_known = encoding is None or (isinstance(encoding, str) and encoding.lower() in _ENCODINGS)
    _require(is_known, "The content encoding is not accepted: send utf-8.")


#: `binary` is what kombu calls a body that it need not decode.
_ENCODINGS = {"utf-8", "utf8", "ascii", "us-ascii", "binary"}


def _decoded(body: bytes) -> Any:
    if _marks(body) > MAX_MARKS:
        raise Refused(f"The body has more than {MAX_VALUES:,} values: send fewer.")
    try:
        payload = json.loads(body.decode(), object_hook=_typed)
    except Refused:
        raise
    except (ValueError, RecursionError):
        raise Refused(UNREADABLE) from None
    why = f"The body has more than {MAX_VALUES:,} values, or is nested more than {BODY_DEPTH} deep: send less."
    _require(_is_within(payload, values=MAX_VALUES, depth=BODY_DEPTH), why)
    return payload


def _marks(body: bytes) -> int:
    """As many as a body of JSON may have values."""
    return sum(map(body.count, (b",", b"[", b"{")))


def _typed(value: dict[str, Any]) -> Any:
    """An object of JSON, or the date, number, UUID or bytes that kombu writes as one."""
    if value.keys() != {"__type__", "__value__"}:
        return value
    try:
        typed = object_hook(value)
        if isinstance(typed, Decimal) and _is_huge(typed):
            raise ValueError
    except Exception:
        raise Refused("A value with a `__type__` cannot be read: send it as plain JSON.") from None
    return typed


def _is_huge(number: Decimal) -> bool:
    """Such a number takes minutes and gigabytes to become an integer; NaN and infinity never do."""
    return not number.is_finite() or len(number.as_tuple().digits) > MAX_DECIMAL or abs(number.adjusted()) > MAX_DECIMAL


def _is_within(value: Any, *, values: int, depth: int, chars: float = math.inf) -> bool:
    """Whether a value of JSON is no larger than that, looking at no more of it."""
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


#: What the first protocol has in its body beside the arguments, by the second's names.
_FIRST_HEADERS = ("task", "id", "group", "eta", "expires", "retries", "timelimit", "root_id", "parent_id", "shadow")


def _of_first_protocol(headers: dict[str, Any], body: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    said = {name: body[name] for name in _FIRST_HEADERS if body.get(name) is not None}
    if body.get("taskset") is not None:
        said["group"] = body["taskset"]
    links = {name: body.get(name) for name in ("callbacks", "errbacks", "chord")}
    return {**said, **headers}, [body.get("args", []), body.get("kwargs", {}), {**links, "chain": None}]


# --- Types ----------------------------------------------------------------------------------------

Check = Callable[[Any], bool]
_PRINTABLE_ASCII = re.compile(r"[ -~]+")


def _is_text(value: str) -> bool:
    """Python's strings may hold half a character, which nothing can send on."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_ID_CHARS and _PRINTABLE_ASCII.fullmatch(value) is not None


def _is_label(value: Any) -> bool:
    """A text for a line of a log: no controls, no characters that change its direction."""
    return isinstance(value, str) and len(value) <= MAX_LABEL_CHARS and value.isprintable()


def _is_any_text(value: Any) -> bool:
    return isinstance(value, str) and _is_text(value)


def _is_address(value: Any) -> bool:
    return value == "" or _is_id(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | int) and value in (0, 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < MAX_RETRIES


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def _is_priority(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= MAX_EXPIRY


def _is_delay(value: Any) -> bool:
    return isinstance(value, int | float) and -MAX_DELAY_S <= value <= MAX_DELAY_S


def _is_limits(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(each is None or _is_seconds(each) for each in value)


def _is_due_time(value: Any) -> bool:
    return 0 <= unix_seconds(value) <= time.time() + MAX_DELAY_S


def _is_expiry(value: Any) -> bool:
    return _is_seconds(value) or 0 <= unix_seconds(value) <= MAX_EXPIRY


def unix_seconds(value: Any) -> float:
    """Of a moment as Celery writes it; NaN for anything else."""
    if not isinstance(value, str | datetime):
        return math.nan
    try:
        moment = maybe_make_aware(maybe_iso8601(value))
        # The epoch's neighbourhood is no moment for a job, and years near the last break Celery's own arithmetic.
        return cast(float, moment.timestamp())
    except Exception:
        return math.nan


def _is_plain(value: Any) -> bool:
    return _is_within(value, values=MAX_HEADER_VALUES, depth=HEADER_DEPTH, chars=MAX_HEADER_CHARS)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_LINKS
        and all(_is_label(name) and name not in _RESERVED_STAMPS for name in value)
    )


def _is_custom(value: Any) -> bool:
    """Headers of the producer's own: none may stand for one of Celery's."""
    return isinstance(value, dict) and all(_is_label(name) and name not in RESERVED for name in value)


_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@/+-]{0,254}")
#: Keys in Redis that are no queues of anybody's: kombu's, Celery's and ours.
_NO_QUEUES = re.compile(r"unacked|idefics:|idefics\.callbacks|celery-task(set)?-meta|celeryev|.*pidbox")


def _is_queue(value: Any) -> bool:
    return isinstance(value, str) and bool(_QUEUE.fullmatch(value)) and not _NO_QUEUES.match(value)


def _is_exchange(value: Any) -> bool:
    # The bindings of our queue's exchange are a set in Redis that producers write to.
    return value == "" or (_is_queue(value) and value != QUEUE)


def _is_retry_policy(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in ("max_retries", "interval_start", "interval_step", "interval_max")
        and isinstance(each, int | float)
        and 0 <= each <= 100
        for name, each in value.items()
    )


def _is_one_of(*values: Any) -> Check:
    return lambda value: isinstance(value, str | int) and value in values


#: Celery's own headers. All but the first two may be null.
_HEADERS: dict[str, Check] = {
    "task": lambda value: _is_label(value) and value != "",
    "id": _is_id,
    "lang": _is_label,
    "shadow": _is_label,
    "origin": _is_label,
    "meth": _is_label,
    "eta": _is_due_time,
    "expires": _is_expiry,
    "group": _is_id,
    "group_index": _is_index,
    "root_id": _is_id,
    "parent_id": _is_id,
    "retries": _is_count,
    "timelimit": _is_limits,
    "argsrepr": _is_any_text,
    "kwargsrepr": _is_any_text,
    "ignore_result": _is_flag,
    "replaced_task_nesting": _is_count,
    "stamped_headers": _is_names,
    "stamps": _is_custom,
    "headers": _is_custom,
    "redelivered": _is_flag,
    SUBMITTED_AT: _is_seconds,
}
#: What Celery writes over anyway, and what only its first protocol has.
_IGNORED = {"hostname", "correlation_id", "reply_to", "delivery_info", "properties", "args", "kwargs", "utc", "taskset"}

#: What a signature may say of the message that it becomes.
_OPTIONS: dict[str, Check] = {
    "task_id": _is_id,
    "root_id": _is_id,
    "parent_id": _is_id,
    "group_id": _is_id,
    "group_index": _is_index,
    "reply_to": _is_address,
    "queue": _is_queue,
    "routing_key": _is_queue,
    "exchange": _is_exchange,
    "exchange_type": _is_one_of("direct"),
    "priority": _is_priority,
    "countdown": _is_delay,
    "eta": _is_due_time,
    "expires": _is_expiry,
    "retries": _is_count,
    "max_retries": _is_count,
    "interval": _is_delay,
    "time_limit": _is_seconds,
    "soft_time_limit": _is_seconds,
    "ignore_result": _is_flag,
    "add_to_parent": _is_flag,
    "shadow": _is_label,
    "origin": _is_label,
    "argsrepr": _is_any_text,
    "kwargsrepr": _is_any_text,
    "headers": _is_custom,
    "serializer": _is_one_of("json"),
    "compression": _is_one_of("gzip", "zlib", "bzip2"),
    "delivery_mode": _is_one_of(1, 2, "transient", "persistent"),
    "retry": _is_flag,
    "retry_policy": _is_retry_policy,
    "replaced_task_nesting": _is_count,
    "stamped_headers": _is_names,
}
_NESTED = {"link", "link_error", "chain", "chord"}

#: Names that a producer's own headers cannot have: Celery would take them for its own.
RESERVED = frozenset({*_HEADERS, *_NESTED, *dir(Context), "callbacks", "errbacks"} - {SUBMITTED_AT, "redelivered"})
#: The same of stamps, which are given to `apply_async` beside its options.
_RESERVED_STAMPS = (
    RESERVED
    | _OPTIONS.keys()
    | {
        *("connection", "producer", "publisher", "router", "route_name", "mandatory", "immediate", "task_type", "body"),
        *("result_cls", "content_type", "content_encoding", "timestamp", "expiration", "declare", "now", "timezone"),
        *("create_sent_event", "name", "message", "app", "self", "confirm_timeout", "timeout", "cls"),
        *("event_dispatcher", "delivery_tag", "body_encoding"),
    }
)


def _checked_headers(headers: dict[str, Any]) -> dict[str, Any]:
    _require(_is_plain(headers), "The headers are too large or nested too deep: put less into them.")
    known: dict[str, Any] = {}
    for name, value in headers.items():
        check = _HEADERS.get(name)
        if check is None:
            # A body without a chain would leave that of the headers standing.
            if value is not None and name not in _IGNORED:
                _require(_is_label(name) and name not in RESERVED, f"The header {_shown(name)} is reserved: rename it.")
                known[name] = value
        elif value is not None or name in ("task", "id"):
            _require(check(value), f"The header {name} is not what Celery sends there: send the job with Celery.")
            known[name] = value
    _require("id" in known, "The message has no id: send it with Celery.")
    stamps = known.get("stamps") or {}
    _require(stamps.keys() >= set(known.get("stamped_headers") or ()), "A stamped header has no stamp: stamp it.")
    return known


def _shown(name: str) -> str:
    return ascii(name[:40])


_PROPERTIES: dict[str, Check] = {
    "priority": _is_priority,
    "reply_to": _is_address,
    "correlation_id": _is_address,
}


def _check_properties(properties: dict[str, Any]) -> None:
    _require(_is_plain(properties), "The properties are too large or nested too deep: send the job with Celery.")
    for name, check in _PROPERTIES.items():
        value = properties.get(name)
        _require(value is None or check(value), f"The property {name} is not what Celery sends: send it with Celery.")


# --- Links ----------------------------------------------------------------------------------------

#: What a body says beside the arguments.
_EMBEDDED = {"callbacks", "errbacks", "chain", "chord"}
_SIGNATURE = {"task", "args", "kwargs", "options", "subtask_type", "immutable", "chord_size"}
#: Canvases that Celery takes apart when it sends them. The tasks of their names never run.
_CANVASES = {"chain": "celery.chain", "group": "celery.group", "chord": "celery.chord"}


def _check_embed(embed: Any) -> None:
    # What stands there goes over the headers, which have been checked.
    _require(isinstance(embed, dict) and embed.keys() <= _EMBEDDED, NO_BODY)
    if any(value is not None for value in embed.values()):
        _check_signatures(_signatures(embed, ("callbacks", "errbacks", "chain"), ("chord",)))


def _check_signatures(signatures: Iterator[Any]) -> None:
    waiting = list(signatures)
    count = 0
    while waiting:
        count += 1
        _require(count + len(waiting) <= MAX_LINKS + 1, f"The job has more than {MAX_LINKS} links: send fewer.")
        waiting += _checked_signature(waiting.pop())


def _signatures(options: dict[str, Any], lists: tuple[str, ...], singles: tuple[str, ...]) -> Iterator[Any]:
    """Those under these names. A text would be one link for each of its characters."""
    for name in lists:
        value = options.get(name)
        _require(value is None or isinstance(value, list), f"{name} is no list of signatures: send it with Celery.")
        yield from value or ()
    yield from (options[name] for name in singles if options.get(name) is not None)


def _checked_signature(signature: Any) -> Iterator[Any]:
    """The signatures in a signature."""
    why = "A link is no signature: make it with app.signature(...)."
    _require(isinstance(signature, dict) and signature.keys() <= _SIGNATURE, why)
    task, kind = signature.get("task"), signature.get("subtask_type")
    args, kwargs, options = (signature.get(name) for name in ("args", "kwargs", "options"))
    _require(_is_label(task) and task != "", why)
    _require(isinstance(args, list) and isinstance(kwargs, dict) and isinstance(options, dict), why)
    _require(signature.get("immutable") is None or _is_flag(signature["immutable"]), why)
    _require(signature.get("chord_size") is None or _is_index(signature["chord_size"]), why)
    _check_options(options)
    once = {**options}
    for name in ("link", "link_error"):
        # One stands alone.
        once[name] = [once[name]] if isinstance(once.get(name), dict) else once.get(name)
    yield from _signatures(once, ("link", "link_error", "chain"), ("chord",))
    if kind:
        yield from _members(task, kind, kwargs)
    else:
        built_in = "A link names one of Celery's built-in tasks, which no worker runs for others: link a task of yours."
        _require(not task.startswith("celery."), built_in)


def _members(task: str, kind: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    why = "A link is a map, starmap, chunks or an unknown canvas: link a task, a chain, a group or a chord."
    _require(isinstance(kind, str) and _CANVASES.get(kind) == task, why)
    if kind == "chord":
        header, body = kwargs.get("header"), kwargs.get("body")
        why = "A link is a chord without a header or a body: make it with chord(header, body)."
        _require(kwargs.keys() <= {"header", "body", "kwargs"} and isinstance(kwargs.get("kwargs", {}), dict), why)
        _require(isinstance(header, list | dict) and isinstance(body, dict), why)
        yield from header if isinstance(header, list) else [header]
        yield body
    else:
        why = f"A link is a {kind} without tasks: make it with {kind}(...)."
        members = kwargs.get("tasks")
        _require(kwargs.keys() == {"tasks"} and isinstance(members, list) and bool(members), why)
        yield from cast(list[Any], members)


def _check_options(options: dict[str, Any]) -> None:
    stamps = options.get("stamped_headers")
    own: set[str] = set(stamps or ()) if _is_names(stamps) else set()
    for name, value in options.items():
        if name in _NESTED or value is None:
            continue
        if name in own:
            _require(_is_plain(value), "A link's stamp is too large: stamp it with less.")
            continue
        check = _OPTIONS.get(name)
        _require(check is not None, f"A link has the option {_shown(name)}, which no link may have: leave it out.")
        _require(cast(Check, check)(value), _WHY.get(name) or f"A link's option {name} is not what Celery sends there.")
    _require(own <= options.keys(), "A stamped header of a link has no stamp: stamp it.")


_NO_QUEUE = "A link goes to what is no queue of yours: name a plain queue."
_WHY = {"queue": _NO_QUEUE, "routing_key": _NO_QUEUE, "exchange": _NO_QUEUE}
