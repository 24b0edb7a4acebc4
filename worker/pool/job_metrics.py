"""Counts how jobs end, in the parent process, which hears of each end once."""

from __future__ import annotations

from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated
from celery.exceptions import Ignore, Reject, Retry

from tasks.errors import from_exception
from tasks.protocol import SUBMITTED_AT, seconds_since
from worker.observability.metrics import E2E_SECONDS, JOBS, RETRIES
from worker.pool.defects import log_defects


@log_defects
def count_end(task: str, headers: dict[str, Any], state: str, code: str = "") -> None:
    """Count a job that ended. `headers`: its message's. `state`, `code`: see `JOBS`."""
    JOBS.labels(task, state, code).inc()
    submitted_at = headers.get(SUBMITTED_AT)
    if submitted_at is not None and state in ("succeeded", "failed"):
        E2E_SECONDS.labels(task).observe(seconds_since(submitted_at))


@log_defects
def count_error(task: str, headers: dict[str, Any], raised: BaseException) -> None:
    """Count a job whose run ended with an error, or with one of Celery's predicates."""
    error = raised.exc if isinstance(raised, ExceptionWithTraceback) else raised
    match error:
        case Retry():
            cause = error.exc
            RETRIES.labels(task, from_exception(cause).code if isinstance(cause, Exception) else "").inc()
        case Reject(requeue=True):
            count_end(task, headers, "returned")
        case Ignore() | Terminated():
            # Another run of the job has ended and was counted, or its revocation is.
            pass
        case _:
            count_end(task, headers, "failed", from_exception(error).code)
