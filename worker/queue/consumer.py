"""Celery's consumer for untrusted messages: none ends the worker, and none is repeated in its log."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import TaskRevokedError

from config.settings import Settings
from tasks.availability import UNAVAILABLE, is_away
from tasks.errors import Internal, InvalidRequest, JobError
from tasks.failed import FailedBounds
from worker.observability.job_fields import job_extra
from worker.observability.redaction import log_defect, without_message
from worker.queue.campaigns import hold_back
from worker.queue.dead_letters import keep_misrouted, misrouted, unknown_task
from worker.queue.due import delay_until_due, release
from worker.queue.envelope import NO_ENVELOPE, NO_TASK, UNREADABLE, MessageRefused, checked, readable, usable_id
from worker.queue.redeliveries import RedeliveryCounter
from worker.queue.refusals import Refusals
from worker.queue.resilient_consumer import ResilientConsumer
from worker.queue.result_backend import Submission, submission_of, taken_now, taken_text
from worker.runtime.exception_info import exception_info

logger = logging.getLogger(__name__)


class Consumer(ResilientConsumer):
    """Refuses unusable messages, whose bodies Celery would log, or which would end its loop."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Not by `--concurrency`, which Celery multiplies: the pool takes this many jobs and no more.
        settings: Settings = options["app"].settings
        super().__init__(*args, **{**options, "initial_prefetch_count": settings.job_threads})
        self._bounds = FailedBounds(settings.failed_max, settings.failed_max_bytes, settings.failed_ttl_s)
        self.refusals = Refusals(self.app, self._bounds)
        self.redeliveries: RedeliveryCounter = getattr(self.pool, "redeliveries", None) or RedeliveryCounter(
            most=settings.max_worker_deaths
        )
        if self.controller is not None:
            # Celery's own would never free a job's place if handing the job over failed.
            self.controller._process_task = self.hand_over

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **options)
        most = self.app.settings.max_job_bytes
        # Kombu's own channel (IDEFICS_ATOMIC_RESERVE=false) does not call it, and other pools have no such property.
        self.task_consumer.channel.can_accept = lambda: getattr(self.pool, "can_accept_jobs", True)
        self.task_consumer.channel.parked = lambda: len(getattr(self.pool, "parking", ()))
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
            # Decoded once, and kept only until the request is made: it takes many times the body's memory.
            message._decoded_cache, message._raw = list(envelope.payload), None
            try:
                watch, arguments = self.app.campaign_watch, envelope.payload[1]
                if not (delay_until_due(message) or hold_back(message, arguments, watch)):
                    handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:
                self._end_by_defect(message, envelope.payload, error)
            finally:
                message._decoded_cache = None

        return on_task_received

    # Messages that are not jobs

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, MessageRefused(UNREADABLE, _id(message)))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._refuse(message, MessageRefused(NO_TASK, _id(message)))

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep the whole message with the failed jobs, from where it can be sent on, and end its job."""
        why = InvalidRequest(unknown_task(message.headers["task"]))
        request = misrouted(message, self.hostname)
        job = job_extra(request.id, request.task, why.code)
        logger.info("Message %s is kept with the failed jobs. %s", request.id, why, extra=job)
        try:
            keep_misrouted(self.app, request, self._bounds, why)
            self.app.backend.mark_as_failure(request.id, why, request=request)
            self._record_callback(request.id, request.task, request.kwargs, why, request.submission)
        except UNAVAILABLE as error:
            if self._requeue_if_away(message, request.id, error):
                return
        self._send_failed_event(request.id, str(why))
        message.reject_log_error(logger, self.connection_errors)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, MessageRefused(NO_ENVELOPE, _id(message)))

    def _refuse(self, message: Any, refused: MessageRefused) -> None:
        """Drop a message, and end its job where it has an id."""
        try:
            submission = self.refusals(message.body if refused.id else _shown(message), refused, taken_text(message))
            if refused.id and submission:
                task, arguments = readable(message, self.app.settings.max_job_bytes)
                self._record_callback(refused.id, task, arguments, InvalidRequest(str(refused)), submission)
        except UNAVAILABLE as error:
            if self._requeue_if_away(message, refused.id, error):
                return
        if refused.id:
            self._send_failed_event(refused.id, str(refused))
        message.reject_log_error(logger, self.connection_errors)

    def _record_callback(
        self, id: str, task: str, arguments: dict[str, Any], error: JobError, submission: Submission
    ) -> None:
        """Record the callback of a job that ends here. Raises one of UNAVAILABLE."""
        failure = states.FAILURE, error
        self.app.recorder.record(id, task, arguments, failure, is_stored=True, digest=submission.digest)

    def _requeue_if_away(self, message: Any, id: str | None, error: Exception) -> bool:
        """Requeue a message whose end cannot be stored, unless a defect is the cause: it would occur again."""
        requeue = is_away(error)
        what = f"Message {id!a}" if id else "A message"
        logger.error(
            "%s cannot be refused (%s): it is %s.", what, error, "requeued" if requeue else "dropped",
            extra=job_extra(id, code=InvalidRequest.code) if id else None,
        )  # fmt: skip
        if requeue:
            message.reject_log_error(logger, self.connection_errors, requeue=True)
        return requeue

    def _send_failed_event(self, id: str, why: str) -> None:
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=id, exception=f"InvalidRequest({why!r})")

    # Our own defects

    def _end_by_defect(self, message: Any, payload: tuple[Any, Any, Any], error: Exception) -> None:
        """End a job whose message could not be handled, with its chord, chain and error links."""
        headers, (args, kwargs, embed) = message.headers, payload
        log_defect(logger, error, headers["id"], headers["task"])
        request = Context({**headers, **embed, "args": args, "kwargs": kwargs, "delivery_info": taken_now(message)})
        try:
            request.submission = submission_of(request, begins=True)
            self.app.backend.mark_as_failure(headers["id"], _internal(error), request=request)
            self._record_callback(headers["id"], headers["task"], kwargs, _internal(error), request.submission)
            message.reject_log_error(logger, self.connection_errors)
        except Exception as again:
            self._return(headers, functools.partial(message.reject_log_error, logger, self.connection_errors), again)

    def hand_over(self, request: Any) -> None:
        """Hand the pool a job that has a place in it. If that fails in any way, the place is freed."""
        try:
            request.execute_using_pool(self.pool)
            return
        except TaskRevokedError:
            pass
        except Exception as error:
            if is_away(error):
                job = job_extra(request.id, request.task_name)
                logger.error("Job %s cannot start (%s): it goes back to the queue.", request.id, error, extra=job)
                request.reject(requeue=True)
            else:
                self._fail(request, error)
        self._release_place()

    def _fail(self, request: Any, error: Exception) -> None:
        log_defect(logger, error, request.id, request.task_name)
        try:
            request.on_failure(exception_info(_internal(error)))
        except Exception as again:
            self._return(request.request_dict, request.reject, again)

    def _return(self, headers: dict[str, Any], reject: Callable[..., None], error: Exception) -> None:
        """Requeue a job whose end could not be stored: as long as Redis is away, otherwise a few times."""
        id, key = headers["id"], (headers["id"], headers.get("retries") or 0)
        job = job_extra(id, headers.get("task"), Internal.code)
        if is_away(error) or not self.redeliveries.is_lost(self.redeliveries.history(key).deaths):
            logger.error("Job %s goes back to the queue.", id, exc_info=without_message(error), extra=job)
            if not is_away(error):
                self.redeliveries.count_return(key)
            reject(requeue=True)
            return
        logger.critical("Job %s was requeued too often; it fails as internal.", id, extra=job)
        try:
            self.refusals.end(id, _internal(error))
        except Exception as away:
            logger.critical("Its end cannot be stored.", exc_info=without_message(away), extra=job)
        reject(requeue=False)

    def _release_place(self) -> None:
        """Free a place, in the event loop's next iteration: the next jobs may fail too, which would recurse deeply."""
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
