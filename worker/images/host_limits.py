"""Limits on simultaneous downloads from one host, so that bulk jobs do not overload a site, and a slow site does not
occupy all threads.

A job waits in its thread only if a slot of its host is likely to be free soon. Otherwise it goes back to the broker
with a countdown. The countdowns of one host are spaced, so that each job returns about when a slot is free for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from worker.observability.metrics import WAITING_FOR_HOST

#: Default maximum seconds that a job's thread waits for a slot.
MAX_WAIT_S = 1.0
#: Minimum and maximum seconds of the countdown of a job that is sent back. With less, its message could arrive before
#: this run has ended.
MIN_COUNTDOWN_S, MAX_COUNTDOWN_S = 1.0, 120.0
#: Assumed seconds of a download from a host without earlier ones.
DEFAULT_DOWNLOAD_S = 0.25


class HostLimitReached(Exception):
    """The host's limit of downloads is reached: the job must be sent again after `countdown` seconds."""

    def __init__(self, countdown: float) -> None:
        super().__init__(countdown)
        self.countdown = countdown


@dataclass(slots=True)
class _Host:
    #: Moving average of the seconds that a download takes.
    usual_s: float
    #: Start of each running download (time.monotonic()).
    began: list[float] = field(default_factory=list)
    #: Number of threads that wait for a slot.
    waiting: int = 0
    #: Time when the last job that was sent back will return (time.monotonic()).
    booked_until: float = 0.0

    def interval_s(self, now: float, slots: int) -> float:
        """Expected seconds between two slots that become free. A download that hangs raises it before it ends."""
        return max(self.usual_s, now - min(self.began, default=now)) / slots


class HostLimiter:
    """Limits the simultaneous downloads from each host. Thread-safe."""

    def __init__(
        self, host_concurrency: int, max_waiting: int | None = None, download_s: float = DEFAULT_DOWNLOAD_S
    ) -> None:
        """`host_concurrency`: downloads at once from one host. `max_waiting`: threads that may wait for one host.
        `download_s`: seconds that a download takes from a host of which nothing is known."""
        self._host_concurrency = host_concurrency
        self._max_waiting = max_waiting
        self._download_s = download_s
        self._hosts: dict[str, _Host] = {}
        self._changed = threading.Condition()

    @property
    def in_use(self) -> int:
        """Number of slots of all hosts that are held or waited for."""
        with self._changed:
            return sum(len(host.began) + host.waiting for host in self._hosts.values())

    @property
    def known_hosts(self) -> int:
        """Hosts that are remembered: those in use, and those to which jobs return."""
        with self._changed:
            return len(self._hosts)

    @contextmanager
    def acquire(self, name: str, wait_s: float | None = None) -> Iterator[None]:
        """Hold one of a host's slots. Raises HostLimitReached if none is free within `wait_s` seconds.

        Without `wait_s`, raises it at once if none is likely to be free within MAX_WAIT_S.
        """
        began = self._begin(name, wait_s)
        try:
            yield
        finally:
            self._end(name, began)

    def _begin(self, name: str, wait_s: float | None) -> float:
        with self._changed:
            host = self._hosts.setdefault(name, _Host(self._download_s))
            now = time.monotonic()
            if len(host.began) >= self._host_concurrency:
                if wait_s is None and not self._is_free_soon(host, now):
                    raise HostLimitReached(self._book(host, now))
                self._wait(host, MAX_WAIT_S if wait_s is None else wait_s)
            now = time.monotonic()
            host.began.append(now)
            return now

    def _is_free_soon(self, host: _Host, now: float) -> bool:
        if self._max_waiting is not None and host.waiting >= self._max_waiting:
            return False
        return (host.waiting + 1) * host.interval_s(now, self._host_concurrency) <= MAX_WAIT_S

    def _wait(self, host: _Host, seconds: float) -> None:
        host.waiting += 1
        with WAITING_FOR_HOST.track_inprogress():
            is_free = self._changed.wait_for(lambda: len(host.began) < self._host_concurrency, seconds)
        host.waiting -= 1
        if not is_free:
            raise HostLimitReached(self._book(host, time.monotonic()))

    def _book(self, host: _Host, now: float) -> float:
        """The countdown, in seconds, of a job that is sent back."""
        earliest = max(host.booked_until, now + MIN_COUNTDOWN_S)
        host.booked_until = min(earliest + host.interval_s(now, self._host_concurrency), now + MAX_COUNTDOWN_S)
        return min(earliest - now, MAX_COUNTDOWN_S)

    def _end(self, name: str, began: float) -> None:
        with self._changed:
            host, now = self._hosts[name], time.monotonic()
            host.began.remove(began)
            host.usual_s += (now - began - host.usual_s) / 4
            if not host.began and not host.waiting and now > host.booked_until:
                del self._hosts[name]
            self._changed.notify_all()
