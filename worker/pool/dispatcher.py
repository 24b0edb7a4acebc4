"""Which jobs may run now: pure decisions over the table of the pool's jobs.

All waiting jobs may run, except that jobs with the same id run one after the other. After a death of the model process
the jobs that were in flight run first, in the groups of `worker/pool/quarantine.py`, each group alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from worker.observability.metrics import QUARANTINED
from worker.pool import quarantine
from worker.pool.job import JobState, PoolJob


@dataclass(frozen=True, slots=True)
class NotRunAgain:
    """Jobs that do not run again after a death of the model process."""

    canceled: list[PoolJob] = field(default_factory=list)
    #: Jobs that killed their process too often while they ran alone.
    lost: list[PoolJob] = field(default_factory=list)


class Dispatcher:
    """The table of the pool's jobs, by serial number. It decides; its caller sends jobs and reports to Celery."""

    def __init__(self) -> None:
        self._jobs: dict[int, PoolJob] = {}
        self._by_id: dict[str, dict[int, PoolJob]] = {}
        #: Groups of jobs that may have killed a process; each group runs alone.
        self._quarantine: deque[list[PoolJob]] = deque()
        self._runs_quarantined = False
        #: Set at the shutdown: no more jobs are admitted or sent.
        self.is_closed = False
        #: Set before the process is killed because of a job that has failed already: the other jobs are not suspects.
        self.culprit_is_known = False

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[PoolJob]:
        """Iterate over a copy, for other threads and for callers that remove jobs meanwhile."""
        return iter(list(self._jobs.values()))

    def __contains__(self, serial: object) -> bool:
        return serial in self._jobs

    def get(self, serial: int) -> PoolJob | None:
        return self._jobs.get(serial)

    def with_id(self, id: str) -> list[PoolJob]:
        """The jobs with one id, in the order of their arrival: retries, and other jobs that reuse the id."""
        return list(self._by_id.get(id, {}).values())

    def same_as(self, job: PoolJob) -> PoolJob | None:
        """The held job with the same id and content, if there is one: the broker has delivered its message again."""
        latest = next((other for other in reversed(self.with_id(job.id)) if other.key == job.key), None)
        return latest if latest is not None and latest.is_same_as(job) else None

    def add(self, job: PoolJob) -> None:
        self._jobs[job.serial] = job
        self._by_id.setdefault(job.id, {})[job.serial] = job

    def remove(self, job: PoolJob) -> bool:
        """Remove a job. False if it was not in the table: a job ends once."""
        if self._jobs.pop(job.serial, None) is None:
            return False
        namesakes = self._by_id[job.id]
        del namesakes[job.serial]
        if not namesakes:
            del self._by_id[job.id]
        return True

    def quarantine(self, job: PoolJob) -> None:
        """Have a job run alone, after the jobs that are in quarantine already."""
        self._quarantine.append([job])
        QUARANTINED.inc()

    @property
    def in_flight(self) -> list[PoolJob]:
        """Jobs that the model process has."""
        return [job for job in self._jobs.values() if job.state is not JobState.WAITING]

    @property
    def is_isolated(self) -> bool:
        """True while a quarantined group runs or waits behind jobs in flight; nothing else may be dispatched."""
        return (self._runs_quarantined or bool(self._quarantine)) and bool(self.in_flight)

    def next_jobs(self) -> list[PoolJob]:
        """The jobs to send now, in order."""
        if self.is_closed or self.is_isolated:
            return []
        group = self._next_group()
        self._runs_quarantined = bool(group)
        waiting = [job for job in self._jobs.values() if job.state is JobState.WAITING and job.waits_for is None]
        return group or [job for job in waiting if self._is_first(job)]

    def _is_first(self, job: PoolJob) -> bool:
        """Whether it is the first of the jobs with its id: the model process identifies jobs by id."""
        return next(iter(self._by_id[job.id])) == job.serial

    def _next_group(self) -> list[PoolJob]:
        while self._quarantine:
            group = [job for job in self._quarantine.popleft() if job.serial in self._jobs]
            if group:
                return group
        return []

    def may_send(self, job: PoolJob) -> bool:
        """Whether one of `next_jobs` may still be sent: it may have ended while the jobs before it were sent."""
        return job.state is JobState.WAITING and job.serial in self._jobs

    def after_death(self) -> NotRunAgain:
        """Plan that the jobs in flight run again, in quarantine if one of them may have killed the process."""
        suspects = self.in_flight
        is_known, self.culprit_is_known = self.culprit_is_known, False
        canceled = [job for job in suspects if job.canceled]
        suspects = [job for job in suspects if not job.canceled]
        for job in suspects:
            job.run_again()
        if is_known:
            return NotRunAgain(canceled)
        if len(suspects) == 1 and _has_died_alone(suspects[0]):
            return NotRunAgain(canceled, lost=suspects)
        self._quarantine.extendleft(reversed(quarantine.groups(suspects)))
        QUARANTINED.inc(len(suspects))
        return NotRunAgain(canceled)


def _has_died_alone(job: PoolJob) -> bool:
    """Count a death of the process while only this job ran; whether that was one too many."""
    job.deaths += 1
    return job.deaths >= quarantine.MAX_DEATHS_ALONE
