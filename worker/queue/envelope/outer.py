"""The outer JSON of a message, as kombu writes it to a queue's list and to `unacked`."""

from __future__ import annotations

import base64
import json
from typing import Any

from kombu.utils.uuid import uuid

from worker.queue.decompression import inflated
from worker.queue.envelope.errors import NO_BODY_TEXT, NO_ENVELOPE, MessageRefused
from worker.queue.envelope.fields import is_count, is_text, usable_id

#: How kombu's messages begin.
_BODY = b'{"body": "'


def opened(raw: bytes, queue: str, most_bytes: int) -> dict[str, Any]:
    """A message as kombu delivers it, its body decoded and no longer compressed. Raises MessageRefused.

    Its delivery_info is replaced by one that names `queue`, to which retries go. A body that inflates to more
    than `most_bytes` is cut after one byte more.
    """
    message: Any = None
    try:
        message = _outer(raw)
        return _delivered(message, queue, most_bytes)
    except MessageRefused as refused:
        raise MessageRefused(str(refused), refused.id or _known_id(message)) from None
    except Exception:
        raise MessageRefused(NO_ENVELOPE, _known_id(message)) from None


def _outer(raw: bytes) -> Any:
    """The JSON of a message. Kombu writes the body first: base64 of megabytes is sliced instead of parsed."""
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
        raise MessageRefused(NO_ENVELOPE)
    body, compression = _decoded_body(message["body"], properties.get("body_encoding")), headers.get("compression")
    if compression:
        headers = {name: value for name, value in headers.items() if name != "compression"}
        try:
            body = inflated(body, compression, most_bytes + 1)
        except ValueError as error:
            raise MessageRefused(str(error)) from None
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
            "delivery_tag": tag if isinstance(tag, str) and is_text(tag) else uuid(),
            "delivery_info": {"exchange": "", "routing_key": queue, **({"redelivered": True} if is_again else {})},
        },
    }


def _decoded_body(body: Any, encoding: Any) -> bytes:
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, bytes) or encoding not in (None, "base64", "utf-8"):
        raise MessageRefused(NO_BODY_TEXT)
    try:
        return base64.b64decode(body) if encoding == "base64" else body
    except ValueError:
        raise MessageRefused(NO_BODY_TEXT) from None


def given_back(record: bytes) -> tuple[dict[str, Any], str, str]:
    """A message that goes back to its queue, with its exchange and routing key. Raises MessageRefused.

    `record` is its entry in kombu's hash of messages that are not acknowledged.
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
        if all(isinstance(each, str) and is_text(each) for each in (exchange, routing_key)):
            return message, exchange, routing_key
    except Exception:
        message = message if isinstance(message, dict) else None
    raise MessageRefused(NO_ENVELOPE, _known_id(message))


def returned_job(message: dict[str, Any]) -> tuple[str, int] | None:
    """The id and the retries of a message from `given_back`; None for one without an id."""
    headers, properties = message.get("headers"), message.get("properties")
    said: dict[str, Any] = headers if isinstance(headers, dict) else {}
    # Celery's first protocol has the id in the body, and in this property too.
    id = usable_id(said.get("id")) or usable_id(properties.get("correlation_id") if properties else None)
    retries = said.get("retries")
    return (id, int(retries) if retries is not None and is_count(retries) else 0) if id else None


def _known_id(message: Any) -> str | None:
    headers = message.get("headers") if isinstance(message, dict) else None
    return usable_id(headers.get("id")) if isinstance(headers, dict) else None
