"""The pool's part in load balancing: this worker's load, and jobs that return to the queue for other workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping, Sequence

from config.settings import Settings
from worker.pool.completion import JobCompletion
from worker.pool.defects import log_defects
from worker.pool.dispatcher import Dispatcher
from worker.pool.job import JobState, PoolJob
from worker.pool.parking import Parking
from worker.pool.supervisor import Supervisor
from worker.pool.wire import GiveBack, Heartbeat
from worker.queue.load_estimates import Load

logger = logging.getLogger(__name__)

#: Seconds that a job must have been here before it may return.
KEPT_S = 0.5
#: Seconds that jobs which return together wait for the last of them.
TOGETHER_S = 0.3
#: Seconds for which a worker takes no jobs after it returned parked ones, and until it may return more.
SHARED_S, SHARE_INTERVAL_S = 0.3, 1.0
NEVER = float("inf")


class Withdrawals:
    """Jobs that return to their queue together, so that they keep their order; by serial numbers. Pure."""

    def __init__(self) -> None:
        self._awaited: set[int] = set()
        self._since = 0.0
        self._returned: set[int] = set()

    @property
    def are_awaited(self) -> bool:
        return bool(self._awaited or self._returned)

    def begin(self, serials: Iterable[int], now: float) -> None:
        """These jobs will return."""
        self._awaited.update(serials)
        self._since = now

    def returned(self, serials: Iterable[int]) -> None:
        """These jobs no longer run."""
        self._returned.update(serials)

    def are_complete(self, held: Container[int], now: float) -> bool:
        """Whether all jobs that are still held have returned, or the missing ones take too long."""
        missing = [serial for serial in self._awaited if serial in held and serial not in self._returned]
        return self.are_awaited and (not missing or now - self._since > TOGETHER_S)

    def end(self) -> list[int]:
        """The jobs that have returned, the latest first."""
        returned, self._returned, self._awaited = self._returned, set(), set()
        return sorted(returned, reverse=True)


class LoadSharing:
    """Computes this worker's load, and returns jobs when worker/queue/load_balancing.py asks for it."""

    def __init__(
        self, jobs: Dispatcher, parking: Parking, completion: JobCompletion, process: Supervisor, settings: Settings
    ) -> None:
        self._jobs = jobs
        self._parking = parking
        self._completion = completion
        self._process = process
        self._max_batch_size = settings.max_batch_size
        #: Jobs that the pool takes.
        self._places = settings.job_threads
        self._pace = self._unknown_pace()
        #: The model's counters, from its process's last heartbeat.
        self.metrics: Mapping[str, int] = {}
        self._withdrawals = Withdrawals()
        self._shared_at = float("-inf")

    def _unknown_pace(self) -> Heartbeat:
        return Heartbeat({}, capacity=self._max_batch_size, width=self._max_batch_size, job_s=0.0, closed_s=0.0)

    def heard(self, heartbeat: Heartbeat) -> None:
        """Take the pace and the counters of a heartbeat."""
        self._pace = heartbeat
        self.metrics = heartbeat.metrics

    def process_started(self) -> None:
        self._pace = self._unknown_pace()

    def process_ended(self) -> None:
        self._withdrawals.end()

    def load(self, *, can_begin: bool) -> Load:
        """This worker's load. `can_begin`: whether a job that arrived now would run."""
        if not can_begin:
            return Load(1, NEVER, len(self._jobs), is_open=False)
        # Parked jobs could not begin in another worker either, as long as it has jobs of its own.
        held = len(self._jobs) - len(self._parking)
        unbegun = held - self._pace.capacity
        # If image hosts hang, jobs may hold all places of a worker although its model is idle.
        may_take = unbegun >= 0 or held < self._places
        is_open = may_take and not self._jobs.is_closed
        has_parked = len(self._parking) > 0
        return Load(self._pace.width, self._pace.job_s, unbegun, is_open, self._pace.closed_s, has_parked)

    @log_defects
    def give_back(self, queue: str, most: int) -> None:
        """Put up to `most` jobs that have not begun back into this queue."""
        now = time.monotonic()
        if self._withdrawals.are_awaited:
            return
        jobs = [job for job in self._jobs if job.waits_for is None and _may_return(job, queue, now)]
        waiting = [job.serial for job in jobs if job.state is JobState.WAITING][-most:]
        if waiting:
            self._withdrawals.begin(waiting, now)
            self._withdrawals.returned(waiting)
            self.hand_back(now)
        elif jobs and self._process.is_ready:
            self._process.send(GiveBack(most, [job.serial for job in jobs]))

    @property
    def has_just_shared(self) -> bool:
        """Whether parked jobs went back to the queue a moment ago: this worker must not take them itself."""
        return time.monotonic() - self._shared_at < SHARED_S

    @log_defects
    def share_parked(self, queue: str, takers: int) -> None:
        """Put a part of the parked jobs back into this queue, for as many workers that have nothing to do.

        They get more of the host's slots with these jobs, or leave them parked as this worker did.
        """
        now = time.monotonic()
        if now - self._shared_at < SHARE_INTERVAL_S:
            return
        parked = sorted((job for job in self._parking if _may_return(job, queue, now)), key=lambda job: -job.serial)
        jobs = parked[: len(parked) * takers // (takers + 1)]
        if jobs:
            self._shared_at = now
            self._completion.give_back(jobs)

    def withdrawn(self, serials: Sequence[int]) -> None:
        """Note which jobs have not begun and will return, as the model process says."""
        self._withdrawals.begin(serials, time.monotonic())

    def returned(self, job: PoolJob) -> None:
        """A withdrawn job no longer runs."""
        self._withdrawals.returned([job.serial])
        self.hand_back(time.monotonic())

    def hand_back(self, now: float) -> None:
        """Once all have returned, put the jobs back into their queue, the first of them last: it is read next."""
        if not self._withdrawals.are_complete(self._jobs, now):
            return
        jobs = [job for job in map(self._jobs.get, self._withdrawals.end()) if job is not None]
        self._completion.give_back(jobs)
        if jobs:
            logger.debug("%d jobs that had not begun are left to other workers.", len(jobs))


def _may_return(job: PoolJob, queue: str, now: float) -> bool:
    return job.queue == queue and not job.is_suspect and not job.canceled and now - job.taken_at > KEPT_S
