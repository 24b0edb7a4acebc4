"""Hard limits: a job over its own limit fails alone; if its thread does not end, the model process is replaced.

A soft limit and a job's `deadline_s` end its text at the next step: `deadline_of` in `worker/jobs/runs.py`.
"""

from __future__ import annotations

import logging

from celery.worker import state as worker_state

from tasks.errors import DeadlineExceeded
from worker.pool.completion import JobCompletion
from worker.pool.dispatcher import Dispatcher
from worker.pool.job import PoolJob
from worker.pool.supervisor import Supervisor
from worker.pool.wire import Abandon

logger = logging.getLogger(__name__)


class TimeLimits:
    """Ends jobs that run for too long."""

    def __init__(self, jobs: Dispatcher, completion: JobCompletion, process: Supervisor, worker_limit_s: float) -> None:
        """`worker_limit_s`: seconds after which a job's thread counts as stuck, independent of the job's own limit."""
        self._jobs = jobs
        self._completion = completion
        self._process = process
        self._worker_limit_s = worker_limit_s
        #: Start times of jobs that failed by their limits while their threads still run, by serial number.
        self._timed_out_running: dict[int, float] = {}

    def enforce(self, now: float) -> bool:
        """End the jobs over their limits, and the process if a thread is stuck. Returns whether one was stuck."""
        for job in self._overdue(now):
            self._time_out(job)
        # The process is killed at the worker's limit, not at the job's: a producer must not cause the model to be
        # loaded again.
        stuck = [began for began in self._timed_out_running.values() if now - began > self._worker_limit_s]
        if stuck:
            logger.warning("%d jobs passed IDEFICS_TIME_LIMIT_S: the model process is replaced.", len(stuck))
            self._jobs.culprit_is_known = True
            self._process.kill("time_limit")
        return bool(stuck)

    def _overdue(self, now: float) -> list[PoolJob]:
        # In a cold shutdown Celery would acknowledge a failure without storing it: such a job is redelivered instead.
        return [] if worker_state.should_terminate else [job for job in self._jobs if job.is_overdue(now)]

    def _time_out(self, job: PoolJob) -> None:
        self._completion.fail(
            job, DeadlineExceeded(f"The job ran for more than its limit of {job.hard_limit} s and was ended.")
        )
        self._timed_out_running[job.serial] = job.accepted_at or 0.0
        self._process.send(Abandon(job.serial))

    def thread_ended(self, serial: int) -> None:
        self._timed_out_running.pop(serial, None)

    def process_ended(self) -> None:
        self._timed_out_running.clear()
