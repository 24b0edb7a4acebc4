"""Counts the jobs that wait for a host in the parent process, and decides when they come back.

A job that would wait long for a host leaves its thread. The parent process keeps it, where it takes neither a thread
nor one of the worker's places (worker/pool/parking.py); its message stays unacknowledged. When a slot of its host
becomes free, this process asks for it. So a job waits without being published again, and other jobs run meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from worker.observability.metrics import WAITING_FOR_HOST

#: Jobs of one worker that wait for hosts. Each takes about 15 kB in the parent process. Further ones go back to the
#: broker.
MAX_PARKED = 1_000
#: Seconds within which a job that was asked for should have come. It may have been canceled.
COMING_S = 1.0


@dataclass(slots=True)
class _Parked:
    jobs: int = 0
    #: Jobs that were asked for and have not come yet, and time.monotonic() of the last request.
    coming: int = 0
    asked_at: float = 0.0


class ParkedJobs:
    """The number of parked jobs by host. Thread-safe.

    The parent never has more jobs of a host than are counted here: a job is counted once the parent has heard of it,
    and a canceled one is still counted, until it is asked for in vain. So none is forgotten there.
    """

    def __init__(self, ask: Callable[[str, int], None] | None = None, most: int = MAX_PARKED) -> None:
        """`ask` has the parent send up to that many jobs of a host. Without it no job is parked."""
        self._ask = ask
        self._most = most
        self._hosts: dict[str, _Parked] = {}
        self._total = 0
        self._lock = threading.Lock()

    @property
    def has_room(self) -> bool:
        return self._ask is not None and self._total < self._most

    @property
    def total(self) -> int:
        """Parked jobs of all hosts."""
        return self._total

    def of(self, host: str) -> int:
        """Parked jobs of a host."""
        with self._lock:
            return self._hosts[host].jobs if host in self._hosts else 0

    @property
    def hosts(self) -> list[str]:
        """Hosts that jobs are parked for."""
        with self._lock:
            return [name for name, host in self._hosts.items() if host.jobs]

    def add(self, host: str) -> None:
        """Count a job that the parent has heard of."""
        with self._lock:
            self._hosts.setdefault(host, _Parked()).jobs += 1
            self._total += 1
        WAITING_FOR_HOST.inc()

    def may_begin(self, host: str) -> bool:
        """Whether a job that needs a slot now is one that was asked for, or no other job waits for this host."""
        with self._lock:
            parked = self._hosts.get(host)
            if parked is None:
                return True
            if self._coming(parked):
                parked.coming -= 1
                return True
            return not parked.jobs

    def resume(self, host: str, room: int) -> None:
        """Ask for as many jobs of a host as fit into `room` with those that are coming."""
        with self._lock:
            parked = self._hosts.get(host)
            if parked is None:
                return
            count = min(parked.jobs, room - self._coming(parked))
            if count > 0:
                parked.jobs -= count
                parked.coming += count
                parked.asked_at = time.monotonic()
                self._total -= count
            elif not parked.jobs and not parked.coming:
                del self._hosts[host]
        if count > 0:
            WAITING_FOR_HOST.dec(count)
            assert self._ask is not None
            self._ask(host, count)

    @staticmethod
    def _coming(parked: _Parked) -> int:
        if parked.coming and time.monotonic() - parked.asked_at > COMING_S:
            parked.coming = 0
        return parked.coming
