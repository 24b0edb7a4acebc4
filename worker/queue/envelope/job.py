"""A job in one of kombu's messages: its headers, body and links, in the forms that Celery's own producers send."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from worker.queue.envelope.bounds import MAX_MARKS, decoded, marks
from worker.queue.envelope.errors import NO_BODY, NO_ENVELOPE, NO_TASK, UNREADABLE, MessageRefused, require
from worker.queue.envelope.fields import is_label, usable_id
from worker.queue.envelope.headers import check_properties, checked_headers
from worker.queue.envelope.links import check_embed

#: By the content type that a message has instead of JSON's.
_SERIALIZERS = {
    "application/x-python-serialize": "pickle",
    "application/x-yaml": "yaml",
    "application/x-msgpack": "msgpack",
}
#: `binary` is what kombu calls a body that it need not decode.
_ENCODINGS = {"utf-8", "utf8", "ascii", "us-ascii", "binary"}
#: Of these entries a body in the first protocol has at least one.
_FIRST_PARTS = {"task", "id", "args", "kwargs"}
#: Entries of a body in the first protocol that are headers in the second, under the same names.
_FIRST_HEADERS = ("task", "id", "group", "eta", "expires", "retries", "timelimit", "root_id", "parent_id", "shadow")


@dataclass(frozen=True, slots=True)
class Envelope:
    """A job's message in Celery's second protocol. All that the worker reads of it has the right type."""

    headers: dict[str, Any]
    #: JSON: positional arguments, keyword arguments, links.
    body: bytes
    #: The same, decoded.
    payload: tuple[Any, Any, Any]


def checked(message: Any, most_bytes: int) -> Envelope:
    """The job in one of kombu's messages. Raises MessageRefused."""
    ids = [usable_id(message.headers.get("id"))] if isinstance(message.headers, dict) else []
    try:
        return _checked(message, most_bytes, ids)
    except MessageRefused as refused:
        why = str(refused)
    except Exception:
        why = UNREADABLE
    raise MessageRefused(why, next(filter(None, ids), None) or _id_of_first_protocol(message))


def _id_of_first_protocol(message: Any) -> str | None:
    """The id of a first-protocol message that was refused before its body was decoded; None without one."""
    body, headers = message.body, message.headers
    if not isinstance(body, bytes) or not isinstance(headers, dict) or "id" in headers or marks(body) > MAX_MARKS:
        return None
    try:
        said = json.loads(body.decode())
        return usable_id(said.get("id")) if isinstance(said, dict) else None
    except Exception:
        return None


def readable(message: Any, most_bytes: int) -> tuple[str, dict[str, Any]]:
    """The task and the keyword arguments of a message that `checked` refuses, as far as they can be read.

    Only the callback in these arguments is needed: arguments without one are not read.
    """
    headers, body = message.headers if isinstance(message.headers, dict) else {}, message.body
    task, arguments = headers.get("task"), None
    if isinstance(body, bytes) and len(body) <= most_bytes and b'"callback"' in body:
        with contextlib.suppress(Exception):
            _check_content(message.content_type, message.content_encoding)
            payload = decoded(body)
            # Celery's first protocol has all of it in the body.
            task = task or (payload.get("task") if isinstance(payload, dict) else None)
            arguments = payload.get("kwargs") if isinstance(payload, dict) else payload[1]
    return str(task) if is_label(task) else "unknown", arguments if isinstance(arguments, dict) else {}


def _checked(message: Any, most_bytes: int, ids: list[str | None]) -> Envelope:
    headers, properties = message.headers, message.properties
    require(isinstance(headers, dict) and isinstance(properties, dict), NO_ENVELOPE)
    body = message.body if isinstance(message.body, bytes) else str(message.body or "").encode()
    # It is not decoded, so its links and its chord stay unknown.
    require(
        len(body) <= most_bytes, f"The job has {len(body):,} bytes and this worker takes {most_bytes:,}: send URLs."
    )
    _check_content(message.content_type, message.content_encoding)
    payload = decoded(body)
    if isinstance(payload, dict):
        # Celery's first protocol says in the body what the second says in headers. Some producers mix both. Keyword
        # arguments alone are neither: read as the first protocol, such a body would have no arguments.
        require(not payload.keys().isdisjoint(_FIRST_PARTS), NO_BODY)
        ids.append(usable_id(payload.get("id")))
        headers, parts = _of_first_protocol(headers, payload)
        # The values that kombu gives a type to stay as they are written.
        written = json.loads(body)
        body = json.dumps(_of_first_protocol({}, written)[1]).encode()
        payload = parts
    require("task" in headers, NO_TASK)
    require(isinstance(payload, list) and len(payload) == 3, NO_BODY)
    args, kwargs, embed = payload
    require(isinstance(args, list) and isinstance(kwargs, dict), NO_BODY)
    headers = checked_headers(headers)
    check_properties(properties)
    check_embed(embed)
    return Envelope(headers, body, (args, kwargs, embed))


def _check_content(kind: Any, encoding: Any) -> None:
    if kind != "application/json":
        name = _SERIALIZERS.get(kind, "another content type") if isinstance(kind, str) else "another content type"
        raise MessageRefused(f"{name} is not accepted: send application/json; in Celery set task_serializer='json'.")
    # Python decodes with any codec that is named here, decompressors among them.
    is_known = encoding is None or (isinstance(encoding, str) and encoding.lower() in _ENCODINGS)
    require(is_known, "The content encoding is not accepted: send utf-8.")


def _of_first_protocol(headers: dict[str, Any], body: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Headers and body in the second protocol."""
    said = {name: body[name] for name in _FIRST_HEADERS if body.get(name) is not None}
    if body.get("taskset") is not None:
        said["group"] = body["taskset"]
    links = {name: body.get(name) for name in ("callbacks", "errbacks", "chord")}
    return {**said, **headers}, [body.get("args", []), body.get("kwargs", {}), {**links, "chain": None}]
