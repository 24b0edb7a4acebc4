"""A consumer of the queue `jobs`, and what a server holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import redis
from kombu import Connection, Queue
from kombu.message import Message

OURS, STOCK = "worker.queue.transport:Transport", "kombu.transport.redis:Transport"
#: Seconds for what a broker does at once.
SOON_S = 20.0


class Taker:
    """A consumer over a connection of its own, and what it was given."""

    def __init__(self, url: str, kind: str, queues: tuple[str, ...], no_ack: bool, options: dict[str, Any]) -> None:
        options = {"priority_steps": list(range(10)), "queue_order_strategy": "priority", **options}
        self.connection = Connection(url, transport=kind, transport_options=options)
        self.channel = self.connection.channel()
        self.messages: list[Message] = []
        self.consumer = self.connection.Consumer(
            [Queue(name) for name in queues],
            channel=self.channel,
            on_message=self.messages.append,
            accept=["json"],
            no_ack=no_ack,
        )

    def send(self, body: str, queue: str = "jobs", priority: int = 5) -> None:
        self.connection.Producer(self.channel, serializer="json").publish(
            body, routing_key=queue, priority=priority, declare=[Queue(queue)]
        )

    def take(self, timeout: float = SOON_S) -> Message:
        """The next message. Raises TimeoutError where there is none."""
        seen = len(self.messages)
        end = time.monotonic() + timeout
        while len(self.messages) == seen:
            if time.monotonic() > end:
                raise TimeoutError
            try:
                self.connection.drain_events(timeout=0.05)
            except TimeoutError:
                continue
        return self.messages[-1]

    def ask(self) -> None:
        """Send a take and do not read its reply."""
        self.channel.backoff.pause_until(0.0)
        self.channel.connection.cycle.on_poll_start()
        assert self.channel._in_poll


Start = Callable[..., Taker]


def held(server: redis.Redis) -> tuple[int, int, int]:
    """Messages in the queue `jobs`, in `unacked`, and in its index."""
    lists = ["jobs", *(f"jobs\x06\x16{priority}" for priority in range(1, 10))]
    return sum(server.llen(name) for name in lists), server.hlen("unacked"), server.zcard("unacked_index")


def bodies(taker: Taker, number: int) -> list[str]:
    return [taker.take().decode() for _ in range(number)]


@contextmanager
def _refused(server: redis.Redis, rule: str) -> Iterator[None]:
    server.execute_command("ACL", "SETUSER", "default", rule)
    yield
    server.execute_command("ACL", "SETUSER", "default", rule.replace("-", "+"))


def send_at(taker: Taker, body: str, at: float, **options: Any) -> None:
    """As Celery sends a job with a countdown."""
    eta = datetime.fromtimestamp(at, UTC).isoformat()
    taker.connection.Producer(taker.channel, serializer="json").publish(
        body, routing_key="jobs", declare=[Queue("jobs")], **{"headers": {"id": body, "eta": eta}, **options}
    )
