"""Celery's consumer without messages: its connection to the broker, and the events that it publishes."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from celery.worker import consumer
from celery.worker.consumer.mingle import Mingle
from kombu.exceptions import OperationalError

logger = logging.getLogger(__name__)

#: Seconds that events are collected. Celery publishes in every iteration of its event loop, at more cost than the jobs.
EVENTS_S = 0.25


class ResilientConsumer(consumer.Consumer):  # type: ignore[misc]
    """Survives errors of the broker that end Celery's own, and handles signals while it reconnects."""

    _publishes_events_at = float("-inf")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Kombu raises this after failed attempts to publish: such a connection is lost too.
        self.connection_errors: tuple[Any, ...] = (*self.connection_errors, OperationalError)
        for step in self.steps:
            if isinstance(step, Mingle):
                step.sync = functools.partial(self._mingle, step.sync)

    def _mingle(self, sync: Callable[[Any], None], consumer: Any) -> None:
        """Ask the other workers for their revocations. Any other error than a lost connection would end the start."""
        try:
            sync(consumer)
        except (*self.connection_errors, *self.channel_errors):
            raise
        except Exception as error:
            logger.warning("The other workers' revocations are unknown (%s).", error)

    def ensure_connected(self, conn: Any) -> Any:
        """Celery's, which checks between its attempts whether to stop: the deferred signals run there too."""
        ensure = conn.ensure_connection
        run_signals = getattr(self.pool, "run_signals", lambda: None)

        def ensure_connection(errback: Any, max_retries: Any, callback: Callable[[], None]) -> Any:
            def between_attempts() -> None:
                run_signals()
                callback()

            return ensure(errback, max_retries, callback=between_attempts)

        conn.ensure_connection = ensure_connection
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection

    def on_send_event_buffered(self) -> None:
        now = time.monotonic()
        if self.hub and now > self._publishes_events_at:
            # If the timer is lost with its connection, a later event sets another.
            self._publishes_events_at = now + EVENTS_S
            self.hub.call_later(EVENTS_S, self._flush_events)

    def shutdown(self) -> None:
        with contextlib.suppress(*self.connection_errors):
            self._flush_events()
        super().shutdown()
