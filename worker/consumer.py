"""Celery's consumer, for messages from anybody: none ends the worker, and none is repeated in its log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from celery.utils.objects import Bunch
from celery.worker import consumer

from config.settings import load
from tasks.errors import InvalidRequest, JobError

logger = logging.getLogger(__name__)

#: What a header or a body of another form than Celery's raises on its way to a request. Not the broker's own errors:
#: those are OSErrors and RedisErrors.
_BAD_FORM = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


#: Seconds that events wait for others. Celery publishes at every turn of its loop, which costs it more than the jobs.
EVENTS_S = 0.25


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery logs the bodies of messages that it cannot use, and lets some of them end its loop."""

    _publishes_events_at = float("-inf")

    def __init__(self, *args: Any, **options: Any) -> None:
        # Whatever `--concurrency` says, which Celery multiplies: the pool's places are all that can be used.
        super().__init__(*args, **{**options, "initial_prefetch_count": load().job_threads})

    def on_send_event_buffered(self) -> None:
        now = time.monotonic()
        if self.hub and now > self._publishes_events_at:
            # A timer that is lost with its connection is set anew with a later event.
            self._publishes_events_at = now + EVENTS_S
            self.hub.call_later(EVENTS_S, self._flush_events)

    def shutdown(self) -> None:
        with contextlib.suppress(*self.connection_errors):
            self._flush_events()
        super().shutdown()

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **options)
        most = load().max_job_bytes
        # Kombu's own channel (IDEFICS_ATOMIC_TAKE=false) does not ask; nor has another pool an answer.
        self.task_consumer.channel.wants = lambda: getattr(self.pool, "wants_jobs", True)
        self.task_consumer.channel.most_bytes = most

        def on_task_received(message: Any) -> None:
            size = len(message.body or "")
            if size > most:
                # Not even decoded, so its links and its chord stay unknown.
                self._refuse(message, f"The job has {size:,} bytes and this worker takes {most:,}: send URLs.")
                return
            try:
                handle(message)
            except _BAD_FORM as error:
                self.on_invalid_task(None, message, error)

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, "The message cannot be decoded: send JSON, as Celery's serializer 'json' does.")

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._refuse(message, "The message is no task of Celery's: send it with Celery.")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, "The message names no task of this worker: use one of the six.")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, f"The message has not the form of Celery's ({type(exc).__name__}): send it with Celery.")

    def _refuse(self, message: Any, why: str) -> None:
        """Drop a message, and end its job where it has an id."""
        headers = message.headers if isinstance(message.headers, dict) else {}
        id = headers.get("id")
        logger.error("A message of %d bytes is dropped. %s", len(message.body or ""), why)
        if isinstance(id, str) and 0 < len(id) < 256:
            self._fail(id, headers, InvalidRequest(why))
        message.reject_log_error(logger, self.connection_errors)

    def _fail(self, id: str, headers: dict[str, Any], error: JobError) -> None:
        request = Bunch(chord=None, errbacks=None, chain=None, task=None, delivery_info={}, id=id)
        with contextlib.suppress(*_BAD_FORM):
            self.app.backend.mark_as_failure(id, error, request=request)
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=id, exception=repr(error))
