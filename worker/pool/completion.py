"""How jobs end: each is reported to Celery once, and its place is given to the next job."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, assert_never

from billiard.exceptions import Terminated
from celery.exceptions import Reject
from celery.worker import state as worker_state

from tasks.availability import is_away
from tasks.errors import Internal
from worker.observability.job_fields import job_extra
from worker.pool.dispatcher import Dispatcher
from worker.pool.job import PoolJob
from worker.pool.job_metrics import count_end
from worker.pool.parking import Parking
from worker.pool.wire import Away, Broken, Canceled, Done, JobEnd, Raised
from worker.queue.redeliveries import RedeliveryCounter

logger = logging.getLogger(__name__)


class JobCompletion:
    """Removes jobs from the table when they end."""

    def __init__(self, jobs: Dispatcher, redeliveries: RedeliveryCounter, parking: Parking) -> None:
        self._jobs = jobs
        self._redeliveries = redeliveries
        self._parking = parking

    def report(self, job: PoolJob, outcome: JobEnd) -> None:
        """Report a job's end, of which the model process has sent a message."""
        match outcome:
            case Done():
                # Its result, failure or retry is stored: Celery acknowledges.
                self.end(job, lambda: _succeed(job, outcome.outcome))
            case Raised():
                self.end(job, lambda: self._reject(job, outcome))
            case Broken(_, message):
                # In a cold shutdown Celery would acknowledge a failure without storing it.
                is_cold = worker_state.should_terminate
                self.fail(job, Reject(message, requeue=True) if is_cold else Internal(message))
            case Away():
                # Not the job's fault, so its start is not counted.
                self.unmark_started([job])
                self.fail(job, Reject("Redis is away", requeue=True))
            case Canceled(_, partial):
                job.partial = partial
                # Celery would acknowledge an Ignore; with Terminated the revocation acknowledges.
                self.fail(job, Terminated("canceled"))
            case _:
                assert_never(outcome)

    def fail(self, job: PoolJob, error: BaseException) -> None:
        """End a job with an error, or with one of Celery's predicates."""
        self.end(job, functools.partial(job.fail, error))

    def give_back(self, jobs: Sequence[PoolJob]) -> None:
        """Put jobs that have not begun back into their queue, in this order: the last one is read next."""
        self.unmark_started(jobs)
        for job in jobs:
            self.end(job, job.give_back)

    def has_expired(self, job: PoolJob) -> bool:
        """Whether a job's time to start is over, or it was revoked; then it has ended."""
        request = job.callbacks.request
        if request is None or not request.revoked():
            return False
        # The revocation has stored its end.
        self.end(job, lambda: None)
        return True

    def unmark_started(self, jobs: Sequence[PoolJob]) -> None:
        """Forget the starts of jobs that are requeued in order."""
        self._redeliveries.unmark_started([(job.key, job.returns) for job in jobs if job.returns])

    def end(self, job: PoolJob, notify: Callable[[], None]) -> None:
        """Report a job's end by `notify` and free its place, once."""
        if not self._jobs.remove(job):
            return
        try:
            notify()
        except MemoryError:
            raise
        except Exception as error:
            self._fail_to_notify(job, error)
        finally:
            if not self._jobs.is_closed:
                self._parking.ended(job)

    def _reject(self, job: PoolJob, raised: Raised) -> None:
        rejection = getattr(raised.exception.exception, "exc", raised.exception.exception)
        if getattr(rejection, "requeue", False) and not self._may_return(job):
            job.fail(Internal("The job was requeued too often: the worker's log has the reason."))
        else:
            job.callbacks.failure(raised.exception)

    def _fail_to_notify(self, job: PoolJob, error: Exception) -> None:
        """Requeue a job whose end could not be reported: after a defect only as often as one whose worker dies."""
        again = is_away(error) or self._may_return(job)
        what = "goes back to the queue" if again else "is dropped"
        about = job_extra(job.id, job.trace_arguments[0])
        logger.error("The end of job %s could not be reported: it %s.", job.id, what, exc_info=error, extra=about)
        job.fail(Reject("its outcome could not be stored", requeue=again))

    def _may_return(self, job: PoolJob) -> bool:
        """Count a requeue for another reason than Redis's absence. False if there were too many."""
        self._redeliveries.count_return(job.key)
        return not self._redeliveries.is_lost(self._redeliveries.history(job.key).deaths)


def _succeed(job: PoolJob, outcome: tuple[Any, ...]) -> None:
    job.callbacks.success(outcome)
    failed, *_ = outcome
    # Celery's request handles a failure or a retry, and counts it (worker/pool/request.py).
    if not failed:
        task, _, headers, *_ = job.trace_arguments
        count_end(task, headers, "succeeded")
