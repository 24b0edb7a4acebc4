"""The worker's state: in its state file, for the probe (worker/health.py), and in metrics."""

from __future__ import annotations

from dataclasses import dataclass

from worker.health import StateFile, WorkerState
from worker.observability.metrics import JOBS_IN_FLIGHT, RESIDENT_MEMORY, WORKER_STATE
from worker.pool.dispatcher import Dispatcher
from worker.pool.parking import Parking
from worker.pool.supervisor import Supervisor
from worker.queue.redis_check import RedisCheck
from worker.runtime.process_memory import resident_bytes


@dataclass(frozen=True, slots=True)
class HeldJobs:
    """The pool's jobs."""

    jobs: Dispatcher
    parking: Parking
    #: The number of jobs that the pool takes, without those that are parked.
    places: int

    @property
    def are_all(self) -> bool:
        """Whether the pool takes no more jobs."""
        return self.jobs.is_closed or len(self.jobs) - len(self.parking) >= self.places


class StateReport:
    """Combines the states of the servers, the model process and the jobs."""

    def __init__(self, file: StateFile, redis_check: RedisCheck, process: Supervisor, held: HeldJobs) -> None:
        self._file = file
        self._redis_check = redis_check
        self._process = process
        self._held = held
        JOBS_IN_FLIGHT.set_function(held.jobs.__len__)
        RESIDENT_MEMORY.set_function(lambda: resident_bytes(process.pid))

    def renew(self, now: float) -> None:
        """Write the state at time.monotonic() `now`, if it is new or was written a while ago."""
        state, why = self._state(now)
        self._file.show(state, why)
        for each in WorkerState:
            WORKER_STATE.labels(each.name.lower()).set(each is state)

    def _state(self, now: float) -> tuple[WorkerState, str]:
        if not self._redis_check.have_answered:
            return WorkerState.STARTING, f"The worker waits for Redis. {self._redis_check.missing}"
        state, why = self._process.state(now)
        if state is not WorkerState.READY:
            return state, why
        return (WorkerState.BUSY if self._held.are_all else WorkerState.READY), f"{len(self._held.jobs)} jobs"
