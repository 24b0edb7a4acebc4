"""Envelopes, read and refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.canvas import Signature
from kombu.transport.virtual import Message

from tests.support.messages import ARGUMENTS, raw_message
from worker.queue.envelope import Envelope, MessageRefused, checked, opened

MOST = 3_000_000
#: Kombu asks it to decode bodies.
CHANNEL = SimpleNamespace(decode_body=lambda body, encoding: body)
LINK: dict[str, Any] = {
    "task": "shop.save",
    "args": [],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": False,
}


def read(raw: bytes, most: int = MOST) -> Envelope:
    return checked(Message(opened(raw, "idefics", most), channel=CHANNEL), most)


def refusal(raw: bytes, most: int = MOST) -> MessageRefused:
    with pytest.raises(MessageRefused) as raised:
        read(raw, most)
    return raised.value


PRODUCER = Celery("producer", broker="memory://", backend="cache+memory://", set_as_current=False)


def caption() -> Signature:
    return PRODUCER.signature("idefics.caption", kwargs={"image": "x"}, queue="idefics")


def of(name: str, **options: Any) -> Signature:
    return PRODUCER.signature(f"shop.{name}", **options)


def stamped() -> Signature:
    signature = caption().set(link=of("save"))
    signature.stamp(monitoring_id="7")
    return signature


def message(headers: dict[str, Any] | None = None, body: Any = ARGUMENTS, **outer: Any) -> Message:
    return Message(opened(raw_message(headers, body, **outer), "idefics", MOST), channel=CHANNEL)


def link(**changes: Any) -> dict[str, Any]:
    return {**LINK, **changes}


def with_options(**options: Any) -> dict[str, Any]:
    return link(options=options)
