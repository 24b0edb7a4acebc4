"""Celery's request for a job: a job's end is stored, its callback recorded, its message acknowledged, in this order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from celery.signals import task_revoked
from celery.worker import state as worker_state
from celery.worker.request import Request
from celery.worker.state import task_ready
from kombu.serialization import loads

from tasks.availability import UNAVAILABLE, is_away
from tasks.errors import JobError
from tasks.protocol import HIDDEN
from worker.delivery.recorder import TerminalState
from worker.observability import tracing
from worker.observability.job_fields import about_job, job_extra
from worker.pool.job import PoolJob
from worker.pool.job_metrics import count_end, count_error
from worker.queue.result_backend import current_submission, submission_of, taken_now

logger = logging.getLogger(__name__)


class JobRequest(Request):  # type: ignore[misc]
    """A request that is revoked only once its job has ended: its partial result is stored with the revocation.

    Revocations, expiries and failures that the pool reports end here. The model process records the callbacks of all
    other jobs.
    """

    #: Set if the job ends in this process.
    _terminal_state: TerminalState | None = None
    _defers_acknowledgement = False
    _owes_acknowledgement = False

    def __init__(self, message: Any, *args: Any, **options: Any) -> None:
        super().__init__(message, *args, **options)
        self._delivery_info.update(taken_now(message))
        self._argsrepr, self._kwargsrepr = HIDDEN.values()
        self.request_dict.update(HIDDEN)
        # The decoded payload takes many times the memory of the body, so it is decoded again when needed.
        self._args = self._kwargs = self._Request__payload = None
        for name in ("args", "kwargs"):
            self.request_dict.pop(name, None)

    @property
    def _payload(self) -> Sequence[Any]:
        """Arguments, keyword arguments and links. Decoded at each access, since few need it."""
        if self._decoded:
            return self._body  # type: ignore[no-any-return]
        return loads(self._body, self._content_type, self._content_encoding)  # type: ignore[no-any-return]

    @property
    def args(self) -> Any:
        return self._payload[0]

    @property
    def kwargs(self) -> Any:
        return self._payload[1]

    @cached_property
    def _context(self) -> Context:
        args, kwargs, embed = self._payload
        return Context({**self.request_dict, "args": args, "kwargs": kwargs, **embed})

    def _ending_context(self) -> Context:
        """The context to store a job's end with. A job that never began is a new submission."""
        context = self._context
        context.submission = submission_of(context, begins=self.time_start is None)
        return context

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` and Flower show. Celery's own hides the arguments only if `safe` is set."""
        return dict(super().info(safe=True))

    @property
    def _job(self) -> PoolJob | None:
        """The pool's job, while the pool holds it."""
        return self._apply_result and self._apply_result()  # type: ignore[no-any-return]

    def terminate(self, pool: Any, signal: int | None = None) -> None:
        """End the job, for `revoke(terminate=True)`. Celery's own stores the end before the job has ended."""
        job = self._job
        if job is None:
            # The job waits for a place in the pool; it is revoked when it gets one.
            super().terminate(pool, signal)
        else:
            job.terminate(signal)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Store a failure, then acknowledge. Celery acknowledges a lost job first; a kill in between loses its end."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        span: AbstractContextManager[None] = nullcontext()
        if isinstance(error, JobError) and not return_ok:
            self._terminal_state = states.FAILURE, error
            self._ending_context()
            span = self._span(states.FAILURE, error.code)
        with about_job(self.id, self.task_name, getattr(error, "code", None)), span:
            self._end_by(exc_info, send_failed_event, return_ok)
        count_error(self.task_name, self.request_dict, exc_info.exception)

    def _end_by(self, *failure: Any) -> None:
        self._defers_acknowledgement = True
        try:
            super().on_failure(*failure)
        finally:
            self._defers_acknowledgement = False
        if self._owes_acknowledgement:
            self.acknowledge()

    def _span(self, state: str, code: str = "") -> AbstractContextManager[None]:
        """A span for a job that ends in this process, which its callback continues."""
        return tracing.job_ended(self.task_name, self.id, self.request_dict, state, code)

    def give_back(self) -> None:
        """Put the message back as if it had never been taken. A rejected one would be marked as redelivered."""
        task_ready(self)
        self.acknowledged = True
        self.send_event("task-rejected", requeue=True)
        self.message.channel.qos.hand_back(self.message)
        count_end(self.task_name, self.request_dict, "returned")

    def acknowledge(self) -> None:
        self._owes_acknowledgement = self._defers_acknowledgement
        if not self._defers_acknowledgement and self._record_callback():
            super().acknowledge()

    def _record_callback(self) -> bool:
        """Record the callback, if the job ended here and has one; False where the message must stay unacknowledged."""
        if self._terminal_state is None:
            return True
        try:
            submission = current_submission(self._context)
            self.task.app.recorder.record(
                self.id,
                self.task_name,
                self.kwargs,
                self._terminal_state,
                is_stored=self.store_errors,
                digest=submission.digest,
            )
        except UNAVAILABLE as error:
            job = job_extra(self.id, self.task_name)
            logger.error("Job %s ended, but its callback cannot be recorded (%s).", self.id, error, extra=job)
            # While Redis is away the message stays unacknowledged. Any other error would occur at each redelivery.
            return not is_away(error)
        return True

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Celery's, except that the stored error carries the partial result."""
        task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self._store_revocation(reason)
        if expired:
            # Otherwise Celery would also revoke later jobs with this id.
            worker_state.revoked.discard(self.id)
        self._terminal_state = states.REVOKED, None
        with self._span(states.REVOKED):
            self.acknowledge()
        self._already_revoked = True
        count_end(self.task_name, self.request_dict, "expired" if expired else "canceled")
        task_revoked.send(self.task, request=self._context, terminated=terminated, signum=signum, expired=expired)

    def _store_revocation(self, reason: str) -> None:
        job, context, backend = self._job, self._ending_context(), self.task.backend
        partial = [job.partial] if job is not None and job.partial else []
        error = TaskRevokedError(reason, *partial)
        if self.store_errors:
            backend.store_result(self.id, error, states.REVOKED, request=context)
        if context.chord:
            backend.on_chord_part_return(context, states.REVOKED, error)
