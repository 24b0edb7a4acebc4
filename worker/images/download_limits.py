"""All limits on the downloads of a model process: of the whole network, of each host, and those shared by workers."""

from __future__ import annotations

import logging
import threading

from config.settings import Settings
from worker.images.host_leases import HostLeases
from worker.images.host_limits import HostLimiter
from worker.images.parking import ParkedJobs

logger = logging.getLogger(__name__)

#: The name of the whole network, as a host. No host has it.
NETWORK = "*"
#: Seconds between two looks at leases and parked jobs, while there are any.
TICK_S = 0.1


class DownloadLimits:
    """The limiters, and a thread that renews leases and resumes parked jobs. Thread-safe."""

    def __init__(self, settings: Settings, parked: ParkedJobs | None = None, leases: HostLeases | None = None) -> None:
        """`parked`: where jobs wait. `leases`: of the slots that all workers share; None: they share none."""
        self._parked = ParkedJobs() if parked is None else parked
        self._leases = leases
        #: The whole network counts as one host, so that hosts that hang leave threads to jobs without URLs. Only a
        #: quarter may wait: otherwise all threads could wait before it shows that the hosts hang.
        most, waiting = settings.image_job_concurrency, settings.image_job_concurrency // 4
        self.network = HostLimiter(most, max_waiting=waiting, parked=self._parked)
        self.hosts = HostLimiter(
            settings.image_host_concurrency,
            max_waiting=None if parked is None else waiting,
            parked=self._parked,
            ask_for_lease=self._look if leases else None,
        )
        self._due = threading.Event()
        self._start = threading.Lock()
        self._is_started = False

    def park(self, host: str) -> None:
        """A job waits for this host in the parent process."""
        self._parked.add(host)
        self._look()

    def _look(self) -> None:
        self._due.set()
        if not self._is_started:
            with self._start:
                is_started, self._is_started = self._is_started, True
            if not is_started:
                threading.Thread(target=self._loop, name="hosts", daemon=True).start()

    def _loop(self) -> None:
        while True:
            is_busy = self._parked.total or self.hosts.known_hosts
            self._due.wait(TICK_S if is_busy else None)
            self._due.clear()
            self._renew()
            for name in self._parked.hosts:
                (self.network if name == NETWORK else self.hosts).resume_parked(name)

    def _renew(self) -> None:
        requests = self.hosts.lease_requests() if self._leases else []
        if not requests:
            return
        assert self._leases is not None
        try:
            self.hosts.leased(requests, self._leases.exchange(requests))
        except Exception as error:
            # No job fails for this: each worker keeps to its own limit.
            logger.debug("The workers' shared slots of hosts cannot be leased: %s", error)
            self.hosts.lost_leases()
