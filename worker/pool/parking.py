"""Jobs that wait for an image's host in this process, and the pool's places.

A parked job has neither a thread of the model process nor a place in the pool, so other jobs are taken meanwhile; its
message stays unacknowledged, and returns to the queue if the worker stops. The model process says when a host has room
(worker/images/parking.py). Then the job needs a place again; it gets the next one that is free, before new jobs.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from kombu.asynchronous.semaphore import LaxBoundedSemaphore

from worker.pool.job import PoolJob

OnPlace = Callable[[PoolJob], None]


class Parking:
    """The parked jobs, by host."""

    def __init__(self, places: LaxBoundedSemaphore) -> None:
        """`places`: Celery's semaphore of the pool."""
        self._places = places
        self._by_host: dict[str, dict[int, PoolJob]] = {}
        #: Jobs that were parked and wait for a place.
        self._claims: deque[tuple[PoolJob, OnPlace]] = deque()

    def __len__(self) -> int:
        """The number of jobs without a place."""
        return sum(map(len, self._by_host.values())) + sum(job.waits_for is not None for job, _ in self._claims)

    def __iter__(self) -> Iterator[PoolJob]:
        """The jobs that wait for a host."""
        for jobs in self._by_host.values():
            yield from jobs.values()

    def park(self, job: PoolJob, host: str) -> None:
        """Have a job wait for a host, and give its place to another one."""
        job.waits_for = host
        self._by_host.setdefault(host, {})[job.serial] = job
        if job.has_place:
            job.has_place = False
            self.free_place()

    def ended(self, job: PoolJob) -> None:
        """Forget a job that has ended, and give its place to another one."""
        if job.waits_for is not None:
            self._remove(job, job.waits_for)
            job.waits_for = None
        if job.has_place:
            self.free_place()

    def _remove(self, job: PoolJob, host: str) -> None:
        jobs = self._by_host.get(host, {})
        if jobs.pop(job.serial, None) is not None and not jobs:
            del self._by_host[host]

    def take(self, host: str, most: int) -> list[PoolJob]:
        """Up to `most` jobs that wait for a host, the most urgent first, and of these the oldest."""
        waiting = self._by_host.get(host, {}).values()
        jobs = heapq.nsmallest(most, waiting, key=lambda job: (job.priority, job.serial))
        for job in jobs:
            self._remove(job, host)
        return jobs

    def take_all(self) -> list[PoolJob]:
        """All jobs that wait for hosts, the oldest first."""
        jobs = sorted(self, key=lambda job: job.serial)
        self._by_host.clear()
        return jobs

    # Places

    def resume(self, jobs: Iterable[PoolJob], then: OnPlace) -> None:
        """Call `then` once a job that was parked has a place, for each of these."""
        for job in jobs:
            self._claims.append((job, then))
            if self._places.value > 0:
                self._places.acquire(self.free_place)

    def free_place(self) -> None:
        """Give a place to a job that was parked, or to a new one."""
        while self._claims:
            job, then = self._claims.popleft()
            if job.waits_for is None:
                # It has ended.
                continue
            job.waits_for, job.has_place = None, True
            then(job)
            return
        self._places.release()
