"""A job, and what waits in queues."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import redis
from kombu.message import Message

from tasks import Caption, Client

SIGNED = "https://example.com/a.jpg?X-Amz-Signature=s3cr3t"
JOB = Caption(image=SIGNED, prompt="This is an image of", metadata={"row": 7})
RESULTS = "cache+memory://"


def received(client: Client, queue: str | None = None) -> list[Message]:
    """What waits in a queue, in order."""
    messages = []
    with client.app.connection_for_read() as connection:
        channel = connection.default_channel
        while message := channel.basic_get(queue or client.queue):
            message.accept = {"application/json"}
            message.ack()
            messages.append(message)
    return messages


def only(client: Client, queue: str | None = None) -> Message:
    (message,) = received(client, queue)
    return message


def end(client: Client, id: str, outcome: Any, state: str) -> None:
    """Store a job's outcome as its worker would."""
    client.app.backend.store_result(id, outcome, state)


def away(client: Client, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results' Redis is, when it is asked so often."""
    backend, asked = client.app.backend, itertools.count(1)
    stock = backend.get_task_meta

    def ask(id: str) -> Any:
        if next(asked) <= times:
            raise redis.ConnectionError("away")
        return stock(id)

    monkeypatch.setattr(backend, "get_task_meta", ask)
