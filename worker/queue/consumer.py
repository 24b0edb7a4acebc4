"""Celery's consumer, for messages from anybody: none ends the worker, and none is repeated in its log."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from celery.worker import consumer
from celery.worker.consumer.mingle import Mingle
from kombu.exceptions import OperationalError

from config.settings import Settings
from tasks.availability import UNAVAILABLE, is_away
from tasks.errors import Internal, InvalidRequest, JobError
from tasks.failed import FailedBounds
from worker.observability.redaction import without_values
from worker.queue.dead_letters import keep_misrouted, misrouted, unknown_task
from worker.queue.due import delay_until_due, release
from worker.queue.envelope import NO_ENVELOPE, NO_TASK, UNREADABLE, MessageRefused, checked, readable, usable_id
from worker.queue.redeliveries import RedeliveryCounter
from worker.queue.refusals import Refusals
from worker.queue.result_backend import Asked, asked_by, taken_now, taken_text
from worker.runtime.exception_info import exception_info

logger = logging.getLogger(__name__)

#: Seconds that events wait for others. Celery publishes at every turn of its loop, which costs it more than the jobs.
EVENTS_S = 0.25


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery logs the bodies of messages that it cannot use, and lets some of them end its loop."""

    _publishes_events_at = float("-inf")

    def __init__(self, *args: Any, **options: Any) -> None:
        # Whatever `--concurrency` says, which Celery multiplies: the pool's places are all that can be used.
        settings: Settings = options["app"].settings
        super().__init__(*args, **{**options, "initial_prefetch_count": settings.job_threads})
        self._bounds = FailedBounds(settings.failed_max, settings.failed_max_bytes, settings.failed_ttl_s)
        self.refusals = Refusals(self.app, self._bounds)
        self.redeliveries: RedeliveryCounter = getattr(self.pool, "redeliveries", None) or RedeliveryCounter(
            most=settings.max_worker_deaths
        )
        # What kombu raises where it has tried in vain to publish: such a connection is lost too.
        self.connection_errors: tuple[Any, ...] = (*self.connection_errors, OperationalError)
        for step in self.steps:
            if isinstance(step, Mingle):
                step.sync = functools.partial(self._mingle, step.sync)
        if self.controller is not None:
            # Celery's keeps a job's place for ever where handing the job over fails.
            self.controller._process_task = self.hand_over

    def _mingle(self, sync: Callable[[Any], None], consumer: Any) -> None:
        """Hear of the other workers' revocations; a connection that drops meanwhile ends Celery's worker."""
        try:
            sync(consumer)
        except (*self.connection_errors, *self.channel_errors):
            raise
        except Exception as error:
            logger.warning("Other workers were not heard (%s): what they know as revoked is not known here.", error)

    def ensure_connected(self, conn: Any) -> Any:
        """Celery's, which asks between its tries whether to stop: the deferred signals that say so run there too."""
        ensure = conn.ensure_connection
        run_signals = getattr(self.pool, "run_signals", lambda: None)

        def ensure_connection(errback: Any, max_retries: Any, callback: Callable[[], None]) -> Any:
            def in_a_pause() -> None:
                run_signals()
                callback()

            return ensure(errback, max_retries, callback=in_a_pause)

        conn.ensure_connection = ensure_connection
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection

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
        most = self.app.settings.max_job_bytes
        # Kombu's own channel (IDEFICS_ATOMIC_RESERVE=false) does not ask; nor has another pool an answer.
        self.task_consumer.channel.can_accept = lambda: getattr(self.pool, "can_accept_jobs", True)
        self.task_consumer.channel.most_bytes = most
        self.redeliveries.channel = self.task_consumer.channel
        if not self.app.settings.atomic_reserve:
            release(self.task_consumer.channel, [queue.name for queue in self.task_consumer.queues])

        def on_task_received(message: Any) -> None:
            try:
                envelope = checked(message, most)
            except MessageRefused as refused:
                self._refuse(message, refused)
                return
            message.headers, message.body, message.content_encoding = envelope.headers, envelope.body, "utf-8"
            # Decoded once, and kept no longer than the request needs it: it takes many times the body's memory.
            message._decoded_cache, message._raw = list(envelope.payload), None
            try:
                if not delay_until_due(message):
                    handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:
                self._end_by_defect(message, envelope.payload, error)
            finally:
                message._decoded_cache = None

        return on_task_received

    # Messages that are no jobs

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, MessageRefused(UNREADABLE, _id(message)))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._refuse(message, MessageRefused(NO_TASK, _id(message)))

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep the message whole with the failed jobs, from where it can be sent on, and end its job."""
        why = InvalidRequest(unknown_task(message.headers["task"]))
        request = misrouted(message, self.hostname)
        logger.error("Message %s is kept with the failed jobs. %s", request.id, why)
        try:
            keep_misrouted(self.app, request, self._bounds, why)
            self.app.backend.mark_as_failure(request.id, why, request=request)
            self._record_callback(request.id, request.task, request.kwargs, why, request.asked)
        except UNAVAILABLE as error:
            if self._comes_again(message, request.id, error):
                return
        self._tell_failed(request.id, str(why))
        message.reject_log_error(logger, self.connection_errors)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, MessageRefused(NO_ENVELOPE, _id(message)))

    def _refuse(self, message: Any, refused: MessageRefused) -> None:
        """Drop a message, and end its job where it has an id."""
        try:
            asked = self.refusals(message.body if refused.id else _shown(message), refused, taken_text(message))
            if refused.id and asked:
                task, arguments = readable(message, self.app.settings.max_job_bytes)
                self._record_callback(refused.id, task, arguments, InvalidRequest(str(refused)), asked)
        except UNAVAILABLE as error:
            if self._comes_again(message, refused.id, error):
                return
        if refused.id:
            self._tell_failed(refused.id, str(refused))
        message.reject_log_error(logger, self.connection_errors)

    def _record_callback(self, id: str, task: str, arguments: dict[str, Any], error: JobError, asked: Asked) -> None:
        """Record the callback of a job that ends here. Raises one of UNAVAILABLE."""
        failure = states.FAILURE, error
        self.app.recorder.record(id, task, arguments, failure, is_stored=True, asked=asked.digest)

    def _comes_again(self, message: Any, id: str | None, error: Exception) -> bool:
        """Give a message back whose end cannot be stored. Not for a defect, which would be there then, too."""
        again = is_away(error)
        what = f"Message {id!a}" if id else "A message"
        logger.error("%s cannot be refused (%s): it %s.", what, error, "comes again" if again else "is dropped")
        if again:
            message.reject_log_error(logger, self.connection_errors, requeue=True)
        return again

    def _tell_failed(self, id: str, why: str) -> None:
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=id, exception=f"InvalidRequest({why!r})")

    # Defects of ours

    def _end_by_defect(self, message: Any, payload: tuple[Any, Any, Any], error: Exception) -> None:
        """End a job, with its chord, chain and error links, that could not be taken in."""
        headers, (args, kwargs, embed) = message.headers, payload
        logger.error("Job %s hit a defect; it fails as internal: %s", ascii(headers["id"]), without_values(error))
        request = Context({**headers, **embed, "args": args, "kwargs": kwargs, "delivery_info": taken_now(message)})
        try:
            request.asked = asked_by(request, begins=True)
            self.app.backend.mark_as_failure(headers["id"], _internal(error), request=request)
            self._record_callback(headers["id"], headers["task"], kwargs, _internal(error), request.asked)
            message.reject_log_error(logger, self.connection_errors)
        except Exception as again:
            self._return(headers, functools.partial(message.reject_log_error, logger, self.connection_errors), again)

    def hand_over(self, request: Any) -> None:
        """Give the pool a job that has its place. Whatever fails, the place is free again."""
        try:
            request.execute_using_pool(self.pool)
            return
        except TaskRevokedError:
            pass
        except Exception as error:
            if is_away(error):
                logger.error("Job %s cannot start (%s): it goes back to the queue.", ascii(request.id), error)
                request.reject(requeue=True)
            else:
                self._fail(request, error)
        self._release_place()

    def _fail(self, request: Any, error: Exception) -> None:
        logger.error("Job %s hit a defect; it fails as internal: %s", ascii(request.id), without_values(error))
        try:
            request.on_failure(exception_info(_internal(error)))
        except Exception as again:
            self._return(request.request_dict, request.reject, again)

    def _return(self, headers: dict[str, Any], reject: Callable[..., None], error: Exception) -> None:
        """Give a job back whose end could not be stored: for as long as Redis is away, else a few times."""
        id, key = headers["id"], (headers["id"], headers.get("retries") or 0)
        if is_away(error) or not self.redeliveries.is_lost(self.redeliveries.history(key).deaths):
            logger.error("Job %s goes back to the queue: %s", ascii(id), without_values(error))
            if not is_away(error):
                self.redeliveries.count_return(key)
            reject(requeue=True)
            return
        logger.critical("Job %s came back too often; it fails as internal.", ascii(id))
        try:
            self.refusals.end(id, _internal(error))
        except Exception as away:
            logger.critical("Its end cannot be stored: %s", without_values(away))
        reject(requeue=False)

    def _release_place(self) -> None:
        """Later, where there is an event loop: the next job in line may fail too, and the next, each in the other."""
        if self.hub:
            self.hub.call_soon(self.controller._quick_release)
        else:
            self.controller._quick_release()


def _internal(error: Exception) -> Internal:
    return Internal(f"{type(error).__name__} in the worker: its log has the traceback.")


def _id(message: Any) -> str | None:
    return usable_id(message.headers.get("id")) if isinstance(message.headers, dict) else None


def _shown(message: Any) -> bytes:
    """A message for the list of dead letters."""
    with contextlib.suppress(Exception):
        return ascii(message.headers).encode() + b" " + bytes(message.body or b"")
    return b""
