"""What the model process publishes: links, errbacks, retries, chains and the bodies of chords."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from celery import Celery
from celery.app import amqp
from kombu import pools
from kombu.exceptions import LimitExceeded, OperationalError

from worker.queue import redis_retry
from worker.queue.redis_retry import RedisAway, with_retries
from worker.runtime import gil


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """Celery's, through which all of its messages go. Waits while the broker is away, if the process may wait."""

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        send = self._create_task_sender()

        def send_with_retries(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if not redis_retry.is_enabled():
                return send(producer, name, message, **options)
            # Celery makes few attempts, and the thread would hold its GIL permit during kombu's pauses.
            options["retry"] = False
            call = functools.partial(send, producer, name, message, **options)
            return with_retries(call, functools.partial(_reconnect, producer))

        return send_with_retries

    _producer_pool: Any = None
    #: Celery creates `app.pool` while it iterates over a dict of all of kombu's pools, which is not thread-safe.
    _pool_is_made = threading.Lock()

    @property
    def producer_pool(self) -> Any:
        with self._pool_is_made:
            if self._producer_pool is None:
                self._producer_pool = _ProducerPool(self.app.pool, limit=self.app.pool.limit)
            return self._producer_pool


class OneProducerEach(Celery):  # type: ignore[misc]
    """An app whose threads hold one producer at a time.

    Celery sends a group with one producer, and asks for a second one for each chain or chord in it. With few producers,
    threads that hold one each would wait for each other for ever.
    """

    @contextlib.contextmanager
    def producer_or_acquire(self, producer: Any = None) -> Iterator[Any]:
        known = producer or getattr(_held, "producer", None)
        if known is not None:
            yield known
            return
        with super().producer_or_acquire() as acquired:
            _held.producer = acquired
            try:
                yield acquired
            finally:
                _held.producer = None


#: The producer that a thread holds.
_held = threading.local()


def _reconnect(producer: Any) -> None:
    with contextlib.suppress(*producer.connection.connection_errors, OperationalError):
        producer.channel.pool.disconnect(inuse_connections=False)


class _ProducerPool(pools.ProducerPool):  # type: ignore[misc]
    """Few producers for many threads: a thread that has to wait for one lets others run meanwhile."""

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        try:
            return super().acquire(block=False)
        except LimitExceeded:
            if not block:
                raise
        with gil.released():
            try:
                return super().acquire(block=True, timeout=redis_retry.max_wait_s() or timeout)
            except LimitExceeded as error:
                if not redis_retry.is_enabled():
                    raise
                raise RedisAway("all producers wait for the broker") from error
