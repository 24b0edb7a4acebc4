"""Kombu's transport with counted redeliveries, for brokers that run no scripts (`IDEFICS_ATOMIC_RESERVE=false`)."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as stock

from tasks.redis_keys import REDELIVERIES
from worker.queue.backoff import Backoff
from worker.queue.visibility_timeout import OnRefused, RestoringQoS, log_refused, redelivered_id


class PlainQoS(RestoringQoS):
    """Kombu's; a job's counted returns are deleted with its message."""

    def ack(self, delivery_tag: str) -> None:
        self._delete_returns(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self._delete_returns(delivery_tag)
        super().reject(delivery_tag, requeue)

    def _delete_returns(self, tag: str) -> None:
        id = redelivered_id(self._delivered.get(tag))
        if id is not None:
            with self.channel.conn_or_acquire() as redis:
                redis.delete(REDELIVERIES.named(id))


class PlainChannel(stock.Channel):  # type: ignore[misc]
    """Kombu's, with that sweep."""

    QoS = PlainQoS

    def __init__(self, connection: Any, **options: Any) -> None:
        self.backoff = Backoff()
        self.on_refused: OnRefused = connection.on_refused
        super().__init__(connection, **options)


class PlainSentinelChannel(PlainChannel, stock.SentinelChannel):  # type: ignore[misc]
    """The same behind Sentinel."""


class PlainTransport(stock.Transport):  # type: ignore[misc]
    """Kombu's, with that channel."""

    Channel = PlainChannel
    on_refused = staticmethod(log_refused)


class PlainSentinelTransport(stock.SentinelTransport):  # type: ignore[misc]
    """The same behind Sentinel."""

    Channel = PlainSentinelChannel
    on_refused = staticmethod(log_refused)
