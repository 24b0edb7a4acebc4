"""A server, and consumers on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.unit.transport.taker import OURS, Start, Taker
from worker.demo import stack
from worker.queue import transport
from worker.queue.pending_acks import forget_pending_acks


@pytest.fixture
def server(broker: stack.Broker) -> Iterator[redis.Redis]:
    """Empty, and as it was after the test."""
    with broker.connect() as server:
        server.flushall()
        yield server
        server.config_set("maxmemory", 0)
        server.execute_command("ACL", "SETUSER", "default", "+@all")
        forget_pending_acks()


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, str | None]]:
    """What was dropped, with its id."""
    refused: list[tuple[bytes, str | None]] = []
    monkeypatch.setattr(transport.Transport, "on_refused", staticmethod(lambda raw, why: refused.append((raw, why.id))))
    return refused


@pytest.fixture
def start(broker: stack.Broker, server: redis.Redis) -> Iterator[Start]:
    started: list[Taker] = []

    def start(*queues: str, kind: str = OURS, no_ack: bool = False, user: str = "", **options: Any) -> Taker:
        url = broker.url.replace("//", f"//{user}@") if user else broker.url
        taker = Taker(url, kind, queues or ("jobs",), no_ack, options)
        started.append(taker)
        taker.consumer.consume()
        return taker

    yield start
    for taker in started:
        taker.connection.release()
