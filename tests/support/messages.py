"""Tasks' messages as kombu writes them to Redis."""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import uuid4

JOB: dict[str, Any] = {"task": "idefics.complete", "id": "job", "retries": 0, "timelimit": [None, None]}
ARGUMENTS: list[Any] = [[], {"prompt": ["Hello"]}, {}]


def task_message(headers: Any, body: Any, properties: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A message with these headers; `properties` and `fields` replace its others. A body of bytes is taken as it is."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    plain = {"body_encoding": "base64", "delivery_tag": str(uuid4()), "delivery_info": {}, "priority": 0}
    return {
        "body": base64.b64encode(text).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {**plain, **(properties or {})},
        **fields,
    }


def raw_message(
    headers: Any = None, body: Any = None, properties: dict[str, Any] | None = None, **fields: Any
) -> bytes:
    """A good job's message in bytes, but for what is given: `headers` that are a dictionary go over the good ones."""
    whole = headers if not isinstance(headers, dict | None) else {**JOB, **(headers or {})}
    plain = {"delivery_tag": "tag", "priority": 5, **(properties or {})}
    return json.dumps(task_message(whole, ARGUMENTS if body is None else body, plain, **fields)).encode()
