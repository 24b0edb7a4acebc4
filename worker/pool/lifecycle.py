"""A job's states in the pool: admitted, sent, started, ended; or canceled, or run again after a death."""

from __future__ import annotations

import logging

from billiard.exceptions import Terminated

from tasks.errors import Internal, WorkerLost
from worker.observability.metrics import REDELIVERIES
from worker.observability.redaction import log_defect
from worker.pool.completion import JobCompletion
from worker.pool.defects import log_defects
from worker.pool.dispatcher import Dispatcher
from worker.pool.job import JobState, PoolJob, RequestCallbacks, is_redelivered, sendable
from worker.pool.load_sharing import LoadSharing
from worker.pool.parking import Parking
from worker.pool.supervisor import Supervisor
from worker.pool.time_limits import TimeLimits
from worker.pool.wire import (
    Cancel,
    Canceled,
    Heartbeat,
    JobEnd,
    JobMessage,
    Parked,
    Resume,
    Returned,
    RunJob,
    Started,
    Waited,
    Withdrawn,
)
from worker.queue.redeliveries import RedeliveryCounter

logger = logging.getLogger(__name__)


class JobLifecycle:
    """Handles Celery's requests, the model process's messages and the dispatcher's decisions."""

    def __init__(
        self,
        jobs: Dispatcher,
        completion: JobCompletion,
        process: Supervisor,
        limits: TimeLimits,
        sharing: LoadSharing,
        redeliveries: RedeliveryCounter,
        parking: Parking,
    ) -> None:
        self._jobs = jobs
        self._completion = completion
        self._process = process
        self._limits = limits
        self._sharing = sharing
        self._redeliveries = redeliveries
        self._parking = parking

    # Celery's requests

    def admit(self, job: PoolJob) -> PoolJob:
        """Take a job, and send it if it may run. Returns the job already held where the message was delivered again."""
        running = self._jobs.same_as(job)
        if running is not None:
            self._adopt(running, job.callbacks)
            return running
        self._jobs.add(job)
        try:
            if is_redelivered(job.trace_arguments):
                self._weigh_history(job)
            self.dispatch()
        except BaseException:
            # It was not admitted: the caller frees its place.
            self._jobs.remove(job)
            raise
        return job

    def _adopt(self, running: PoolJob, callbacks: RequestCallbacks) -> None:
        """Take over a message that was delivered again while its job runs here: one run serves both."""
        older, newer = running.callbacks.request, callbacks.request
        running.callbacks = callbacks
        if older is not None and newer is not None and older.message.delivery_tag != newer.message.delivery_tag:
            # The newer message is used; unacknowledged, the older one would count as prefetched for ever. (Kombu's own
            # transport may deliver a message again under its tag.)
            older.acknowledge()
        if running.accepted_at is not None and self._process.pid is not None:
            callbacks.accept(self._process.pid, running.accepted_at)
        self._parking.free_place()

    @log_defects
    def _weigh_history(self, job: PoolJob) -> None:
        """Have a job run alone, or fail, if workers died while they had it."""
        history = self._redeliveries.history(job.key)
        job.returns, job.is_uncounted = history.returns, history.returns > 0
        REDELIVERIES.inc(job.is_uncounted)
        job.is_suspect = self._redeliveries.is_suspect(history.deaths)
        if self._redeliveries.is_lost(history.deaths):
            why = f"{history.deaths} workers died with this job: look at their logs for the reason."
            self._completion.fail(job, WorkerLost(why))
        elif job.is_suspect:
            self._jobs.quarantine(job)

    @log_defects
    def cancel(self, job: PoolJob) -> None:
        """End all jobs with the id of this one, which their producer canceled."""
        for each in self._jobs.with_id(job.id):
            self._cancel_one(each)

    def _cancel_one(self, job: PoolJob) -> None:
        job.canceled = True
        if job.state is JobState.WAITING:
            self._completion.fail(job, Terminated("canceled"))
            self.dispatch()
        elif self._process.pid is not None:
            self._process.send(Cancel(job.serial))

    # The dispatcher's decisions

    def dispatch(self) -> None:
        """Send the jobs that may run now."""
        if not self._process.is_ready:
            return
        jobs = self._jobs.next_jobs()
        self._redeliveries.mark_started([(job.key, job.returns) for job in jobs if job.is_uncounted])
        for job in jobs:
            # A job that cannot be sent ends, which may admit and send other jobs meanwhile.
            if self._jobs.may_send(job):
                job.is_uncounted = False
                self._send(job)

    def _send(self, job: PoolJob) -> None:
        try:
            self._process.send(RunJob(job.serial, sendable(job.trace_arguments)))
            job.state = JobState.SENT
        except Exception as defect:
            # The other jobs must run.
            log_defect(logger, defect, job.id, job.trace_arguments[0])
            error = Internal(f"{type(defect).__name__} in the worker: its log has the traceback.")
            self._completion.fail(job, error)

    def enforce_limits(self, now: float) -> bool:
        """End jobs over their time limits. Returns whether the process was killed for one."""
        is_stuck = self._limits.enforce(now)
        if not is_stuck:
            # Jobs may have waited for the end of another job with their id.
            self.dispatch()
        return is_stuck

    # The model process's messages

    def process_started(self) -> None:
        self._sharing.process_started()
        self.dispatch()

    def heard(self, message: Heartbeat | JobMessage) -> None:
        match message:
            case Heartbeat():
                self._sharing.heard(message)
            case Started(serial, at):
                self._start(serial, at)
            case Waited(serial, seconds):
                job = self._jobs.get(serial)
                if job is not None:
                    job.waited_s += seconds
            case Withdrawn(serials):
                self._sharing.withdrawn(serials)
            case Returned(serial):
                self._return(serial)
            case Parked(serial, host):
                self._park(serial, host)
            case Resume(host, most):
                self._parking.resume(self._parking.take(host, most), self._unpark)
            case _:
                self._end(message)

    def _start(self, serial: int, at: float) -> None:
        job = self._jobs.get(serial)
        if job is not None and self._process.pid is not None:
            job.accept(self._process.pid, at)

    def _return(self, serial: int) -> None:
        job = self._jobs.get(serial)
        if job is None or job.canceled:
            self._end(Canceled(serial))
        else:
            self._sharing.returned(job)

    def _park(self, serial: int, host: str) -> None:
        """Keep a job until a slot of its image's host is free."""
        self._limits.thread_ended(serial)
        job = self._jobs.get(serial)
        if job is None or job.canceled:
            self._end(Canceled(serial))
            return
        self._completion.unmark_started([job])
        job.state, job.is_uncounted = JobState.WAITING, job.returns > 0
        if not self._jobs.is_closed:
            self._parking.park(job, host)
        self.dispatch()

    def _unpark(self, job: PoolJob) -> None:
        """Run a job that was parked and has a place again."""
        if not self._completion.has_expired(job):
            if job.is_suspect:
                self._jobs.quarantine(job)
            self.dispatch()

    def _end(self, outcome: JobEnd) -> None:
        self._limits.thread_ended(outcome.serial)
        job = self._jobs.get(outcome.serial)
        if job is not None:
            self._completion.report(job, outcome)
        self.dispatch()

    def process_ended(self, status: int) -> None:
        """Have the jobs in flight run again once the next process is ready."""
        self._sharing.process_ended()
        self._limits.process_ended()
        if self._jobs.is_closed:
            return
        logger.error("The model process ended with status %s; %d jobs run again.", status, len(self._jobs.in_flight))
        ended = self._jobs.after_death()
        for job in ended.canceled:
            self._completion.fail(job, Terminated("canceled"))
        for job in ended.lost:
            self._completion.fail(job, WorkerLost())
        self._parking.resume(self._parking.take_all(), self._unpark)

    # The shutdown

    @log_defects
    def leave_unended(self) -> None:
        """The process ended in order: its jobs return to the queue, and their starts are not counted."""
        jobs = self._jobs.in_flight
        self._completion.unmark_started(jobs)
        for job in jobs:
            job.state = JobState.WAITING
