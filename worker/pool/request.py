"""Celery's request behind a job, as a job that can be ended in mid-sentence needs it."""

from __future__ import annotations

import logging
from typing import Any

from celery import states
from celery.exceptions import TaskRevokedError
from celery.signals import task_revoked
from celery.worker.request import Request
from celery.worker.state import task_ready

from tasks.errors import JobError
from worker.announce import UNAVAILABLE, End
from worker.pool.job import Job

logger = logging.getLogger(__name__)


class JobRequest(Request):  # type: ignore[misc]
    """Is revoked once its job has really ended: only then is its text so far known, and nothing is written twice.

    What ends here (a revocation, an expiry, a failure that the pool gives) is announced here, when it is stored and
    before it is acknowledged. The model process announces the others.
    """

    _end: End | None = None
    _is_held = False

    @property
    def _job(self) -> Job | None:
        """The pool's, while it has it."""
        return self._apply_result and self._apply_result()  # type: ignore[no-any-return]

    def terminate(self, pool: Any, signal: int | None = None) -> None:
        """For `revoke(terminate=True)`. Celery's own stores the end of the job before it has come."""
        job = self._job
        if job is None:
            # It waits for its turn, and is revoked when that comes.
            super().terminate(pool, signal)
        else:
            job.terminate(signal)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if return_ok or not isinstance(error, JobError):
            super().on_failure(exc_info, send_failed_event, return_ok)
            return
        # Celery acknowledges first here and stores then: killed in between, the job would never have ended.
        self._end, self._is_held = (states.FAILURE, error), True
        try:
            super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            self._is_held = False
        self.acknowledge()

    def acknowledge(self) -> None:
        if self._is_held:
            return
        if self._end is not None:
            try:
                self.task.announcer.announce(
                    self.id, self.task_name, self.kwargs, self._end, is_stored=self.store_errors, may_wait=False
                )
            except UNAVAILABLE as error:
                logger.error("Job %s ended, but its callback cannot be recorded (%s): it comes again.", self.id, error)
                return
        super().acknowledge()

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Celery's own, but for the partial result that the stored error carries."""
        task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self._store_revocation(reason)
        self._end = states.REVOKED, None
        self.acknowledge()
        self._already_revoked = True
        task_revoked.send(self.task, request=self._context, terminated=terminated, signum=signum, expired=expired)

    def _store_revocation(self, reason: str) -> None:
        job, context, backend = self._job, self._context, self.task.backend
        partial = [job.partial] if job is not None and job.partial else []
        error = TaskRevokedError(reason, *partial)
        if self.store_errors:
            backend.store_result(self.id, error, states.REVOKED, request=context)
        if context.chord:
            backend.on_chord_part_return(context, states.REVOKED, error)
