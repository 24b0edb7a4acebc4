"""What the worker's state file says, for the probe (worker/health.py)."""

from __future__ import annotations

from worker.health import State, StateFile
from worker.pool.dispatcher import Dispatcher
from worker.pool.supervisor import Supervisor
from worker.queue.servers import ServersCheck


class StateReport:
    """Sums up the servers, the model process and the jobs."""

    def __init__(
        self, file: StateFile, servers: ServersCheck, process: Supervisor, jobs: Dispatcher, places: int
    ) -> None:
        """`places`: jobs that the pool takes."""
        self._file = file
        self._servers = servers
        self._process = process
        self._jobs = jobs
        self._places = places

    def renew(self, now: float) -> None:
        """Write the state at time.monotonic() `now`, where it is new or was written a while ago."""
        self._file.show(*self._state(now))

    def _state(self, now: float) -> tuple[State, str]:
        if not self._servers.have_answered:
            return State.STARTING, f"Redis is waited for. {self._servers.missing}"
        state, why = self._process.state(now)
        if state is not State.READY:
            return state, why
        is_full = self._jobs.is_closed or len(self._jobs) >= self._places
        return (State.BUSY if is_full else State.READY), f"{len(self._jobs)} jobs"
