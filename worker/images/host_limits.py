"""Limits on simultaneous downloads from one host, so that bulk jobs do not overload a site, and a slow site does not
occupy all threads.

A job waits in its thread only if a slot of its host is likely to be free soon. Otherwise it is parked in the parent
process until then (parking.py). If too many are, it goes back to the broker with a countdown. The countdowns of one
host are spaced, so that each job returns about when a slot is free for it.

A host's slots are shared with other workers: this worker has those that it leased (host_leases.py).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from worker.images.host_leases import Lease, LeaseRequest
from worker.images.parking import ParkedJobs
from worker.observability.metrics import WAITING_FOR_HOST

#: Default maximum seconds that a job's thread waits for a slot.
MAX_WAIT_S = 1.0
#: Minimum and maximum seconds of the countdown of a job that is sent back. With less, its message could arrive before
#: this run has ended.
MIN_COUNTDOWN_S, MAX_COUNTDOWN_S = 1.0, 600.0
#: Assumed seconds of a download from a host without earlier ones.
DEFAULT_DOWNLOAD_S = 0.25
#: Seconds between two renewals of a host's lease, and while workers lack slots.
RENEW_S, CONTENDED_S = 0.5, 0.2
#: Seconds that a thread waits for the lease of its host. Then it goes on without, since Redis is slow or away.
LEASE_WAIT_S = 0.5
#: Seconds for which no lease is waited for after one failed.
REST_S = 2.0


class HostLimitReached(Exception):
    """The host's limit of downloads is reached: the job must run again later."""

    def __init__(self, host: str, countdown: float, *, may_park: bool) -> None:
        """`may_park`: whether it may wait in the parent process; otherwise it is sent again after `countdown` s."""
        super().__init__(host, countdown)
        self.host = host
        self.countdown = countdown
        self.may_park = may_park


@dataclass(slots=True)
class _Host:
    #: Moving average of the seconds that a download takes.
    usual_s: float
    #: Slots that this worker has.
    slots: int
    #: Start of each running download (time.monotonic()).
    began: list[float] = field(default_factory=list)
    #: Number of threads that wait for a slot.
    waiting: int = 0
    #: Time when the last job that was sent back will return (time.monotonic()).
    booked_until: float = 0.0
    #: Time until which the host must be left alone, and whether other workers must be told.
    closed_until: float = 0.0
    is_closed_here: bool = False
    #: The most slots that were needed at once since the last renewal of the lease.
    peak: int = 0
    #: Number of leases so far, when the next one is due, and whether workers lacked slots at the last one.
    leases: int = 0
    renew_at: float = 0.0
    is_contended: bool = False

    @property
    def needed(self) -> int:
        return len(self.began) + self.waiting

    def interval_s(self, now: float) -> float:
        """Expected seconds between two slots that become free. A download that hangs raises it before it ends."""
        return max(self.usual_s, now - min(self.began, default=now)) / max(1, self.slots)


class HostLimiter:
    """Limits the simultaneous downloads from each host. Thread-safe."""

    def __init__(
        self,
        host_concurrency: int,
        max_waiting: int | None = None,
        download_s: float = DEFAULT_DOWNLOAD_S,
        parked: ParkedJobs | None = None,
        ask_for_lease: Callable[[], None] | None = None,
    ) -> None:
        """`host_concurrency`: downloads at once from one host. `max_waiting`: threads that may wait for one host.
        `download_s`: seconds that a download takes from a host of which nothing is known. `ask_for_lease`: called if a
        lease is due, of hosts whose slots are shared."""
        self._host_concurrency = host_concurrency
        self._max_waiting = max_waiting
        self._download_s = download_s
        self._parked = ParkedJobs() if parked is None else parked
        self._ask_for_lease = ask_for_lease
        #: No lease is waited for until then.
        self._alone_until = 0.0
        self._hosts: dict[str, _Host] = {}
        self._changed = threading.Condition()

    @property
    def in_use(self) -> int:
        """Number of slots of all hosts that are held or waited for."""
        with self._changed:
            return sum(host.needed for host in self._hosts.values())

    @property
    def known_hosts(self) -> int:
        """Hosts that are remembered: those in use or leased, and those to which jobs return."""
        with self._changed:
            return len(self._hosts)

    @contextmanager
    def acquire(self, name: str, wait_s: float | None = None, *, may_park: bool = False) -> Iterator[None]:
        """Hold one of a host's slots. Raises HostLimitReached if none is free within `wait_s` seconds.

        Without `wait_s`, raises it at once if none is likely to be free within MAX_WAIT_S. `may_park`: whether the job
        may then wait in the parent process; such a job does not overtake those that wait there.
        """
        began = self._begin(name, wait_s, may_park)
        try:
            yield
        finally:
            self._end(name, began)

    def close(self, name: str, seconds: float) -> None:
        """Ask a host for nothing for some seconds, as it wishes."""
        with self._changed:
            host = self._host(name)
            host.closed_until = max(host.closed_until, time.monotonic() + seconds)
            host.is_closed_here, host.renew_at = True, 0.0
        if self._ask_for_lease is not None:
            self._ask_for_lease()

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            is_alone = self._ask_for_lease is None or time.monotonic() < self._alone_until
            host = self._hosts[name] = _Host(self._download_s, self._host_concurrency if is_alone else 0)
        return host

    def _begin(self, name: str, wait_s: float | None, may_park: bool) -> float:
        with self._changed:
            host = self._host(name)
            if wait_s is None and may_park and not self._parked.may_begin(name):
                raise self._reached(name, host, may_park)
            self._lease(host)
            now = time.monotonic()
            if host.closed_until > now:
                raise self._reached(name, host, may_park)
            if len(host.began) >= host.slots:
                if wait_s is None and not self._is_free_soon(host, now):
                    raise self._reached(name, host, may_park)
                if not self._wait(host, lambda: len(host.began) < host.slots, MAX_WAIT_S if wait_s is None else wait_s):
                    raise self._reached(name, host, may_park)
            now = time.monotonic()
            host.began.append(now)
            host.peak = max(host.peak, host.needed)
            return now

    def _lease(self, host: _Host) -> None:
        """Get a further slot leased, if one is needed and there may be one."""
        is_whole = host.needed < host.slots or host.slots >= self._host_concurrency
        if self._ask_for_lease is None or is_whole or host.is_contended:
            return
        known, host.renew_at = host.leases, 0.0
        self._ask_for_lease()
        if not self._wait(host, lambda: host.leases > known, LEASE_WAIT_S):
            self._go_alone(time.monotonic())

    def _is_free_soon(self, host: _Host, now: float) -> bool:
        return host.slots > 0 and host.waiting < self._may_wait(host, now, MAX_WAIT_S)

    def _may_wait(self, host: _Host, now: float, within_s: float) -> int:
        """Number of threads that get a slot within some seconds, at most those that may wait."""
        soon = int(within_s / max(1e-6, host.interval_s(now)))
        return soon if self._max_waiting is None else min(soon, self._max_waiting)

    def _wait(self, host: _Host, condition: Callable[[], bool], seconds: float) -> bool:
        host.waiting += 1
        host.peak = max(host.peak, host.needed)
        with WAITING_FOR_HOST.track_inprogress():
            is_met = self._changed.wait_for(condition, seconds)
        host.waiting -= 1
        return is_met

    def _reached(self, name: str, host: _Host, may_park: bool) -> HostLimitReached:
        if may_park and self._parked.has_room:
            return HostLimitReached(name, 0.0, may_park=True)
        return HostLimitReached(name, self._book(name, host, time.monotonic()), may_park=False)

    def _book(self, name: str, host: _Host, now: float) -> float:
        """The countdown, in seconds, of a job that is sent back. It comes after the parked jobs."""
        interval_s = host.interval_s(now)
        begins = max(now, host.closed_until) + max(MIN_COUNTDOWN_S, self._parked.of(name) * interval_s)
        earliest = max(host.booked_until, begins)
        host.booked_until = min(earliest + interval_s, now + MAX_COUNTDOWN_S)
        return min(earliest - now, MAX_COUNTDOWN_S)

    def _end(self, name: str, began: float) -> None:
        with self._changed:
            host, now = self._hosts[name], time.monotonic()
            host.began.remove(began)
            host.usual_s += (now - began - host.usual_s) / 4
            self._changed.notify_all()
            room = self._room(host, now)
            if self._ask_for_lease is None:
                self._forget_unused(name, host, now)
        self._parked.resume(name, room)

    def _forget_unused(self, name: str, host: _Host, now: float) -> None:
        if not host.needed and now > max(host.booked_until, host.closed_until):
            del self._hosts[name]

    # Parked jobs

    def _room(self, host: _Host, now: float) -> int:
        """Number of jobs that could come: some wait in threads, so that a slot is taken when it becomes free."""
        if host.closed_until > now or not host.slots:
            return 0
        return host.slots - len(host.began) + self._may_wait(host, now, MAX_WAIT_S / 2) - host.waiting

    def resume_parked(self, name: str) -> None:
        """Ask for the parked jobs of a host that could begin."""
        with self._changed:
            host = self._hosts.get(name)
            room = self._host_concurrency if host is None else self._room(host, time.monotonic())
        self._parked.resume(name, room)

    # Leases

    def lease_requests(self) -> list[LeaseRequest]:
        """The leases that are due. Those that are no longer needed are given up, and their hosts are forgotten."""
        with self._changed:
            now = time.monotonic()
            if now < self._alone_until:
                return []
            requests = [self._request(name, host, now) for name, host in self._hosts.items() if host.renew_at <= now]
            for request in requests:
                if not request.wanted:
                    self._forget_unused(request.host, self._hosts[request.host], now)
            return requests

    def _request(self, name: str, host: _Host, now: float) -> LeaseRequest:
        wanted = min(self._host_concurrency, max(host.peak, host.needed + self._parked.of(name)))
        closed_s = max(0.0, host.closed_until - now) if host.is_closed_here else 0.0
        host.peak, host.is_closed_here, host.renew_at = 0, False, math.inf
        return LeaseRequest(name, len(host.began), wanted, closed_s)

    def leased(self, requests: Sequence[LeaseRequest], leases: Sequence[Lease]) -> None:
        """Use new leases."""
        with self._changed:
            now = time.monotonic()
            for request, lease in zip(requests, leases, strict=True):
                host = self._hosts.get(request.host)
                if host is not None:
                    host.leases += 1
                    host.slots, host.is_contended = min(lease.slots, self._host_concurrency), lease.is_contended
                    host.renew_at = now + (CONTENDED_S if lease.is_contended else RENEW_S)
                    host.closed_until = max(host.closed_until, now + lease.closed_s)
            self._changed.notify_all()

    def lost_leases(self) -> None:
        """Redis is away: use this worker's own limit until the next attempt."""
        with self._changed:
            self._go_alone(time.monotonic())
            for host in self._hosts.values():
                host.renew_at = self._alone_until

    def _go_alone(self, now: float) -> None:
        self._alone_until = now + REST_S
        for host in self._hosts.values():
            host.slots, host.is_contended = self._host_concurrency, False
            host.leases += 1
        self._changed.notify_all()
