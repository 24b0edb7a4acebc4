"""Whose turn it is at an image's host: a bulk job does not hammer a site, and a slow site does not take all threads.

A job waits in its thread only where its turn comes soon. Else it goes back to the broker, with a countdown: the host's
turns are dealt out one after the other, so that each job comes back about when there is one for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Seconds that a job's thread waits for its turn.
SOON_S = 1.0
#: Seconds before a job comes back. At least so long, since its message must not come while this run still ends.
SHORTEST_S, LONGEST_S = 1.0, 120.0
#: Seconds that a download takes, where nothing is known of its host.
GUESS_S = 0.25


class HostBusy(Exception):
    """So many of this worker's jobs read from the host that this one is to come again, after so many seconds."""

    def __init__(self, countdown: float) -> None:
        super().__init__(countdown)
        self.countdown = countdown


@dataclass(slots=True)
class _Host:
    #: When each download began that runs.
    began: list[float] = field(default_factory=list)
    waiting: int = 0
    #: Seconds that a download took, of late.
    usual_s: float = GUESS_S
    #: When the last one of the turns that were dealt out comes.
    dealt_until: float = 0.0

    def pace_s(self, now: float, turns: int) -> float:
        """Seconds from one turn to the next. A download that hangs tells before it ends."""
        return max(self.usual_s, now - min(self.began, default=now)) / turns


class Hosts:
    """Safe in threads."""

    def __init__(self, turns: int, most_waiting: int | None = None) -> None:
        """`turns`: downloads at once from one host. `most_waiting`: threads that wait there."""
        self._turns = turns
        self._most_waiting = most_waiting
        self._hosts: dict[str, _Host] = {}
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Turns that are held or waited for, at all hosts."""
        with self._changed:
            return sum(len(host.began) + host.waiting for host in self._hosts.values())

    @contextmanager
    def turn(self, name: str, patience_s: float | None = None) -> Iterator[None]:
        """Hold one of a host's turns. Raises HostBusy if none comes soon, or within `patience_s` where given."""
        began = self._begin(name, patience_s)
        try:
            yield
        finally:
            self._end(name, began)

    def _begin(self, name: str, patience_s: float | None) -> float:
        with self._changed:
            host = self._hosts.setdefault(name, _Host())
            now = time.monotonic()
            if len(host.began) >= self._turns:
                if patience_s is None and not self._comes_soon(host, now):
                    raise HostBusy(self._deal(host, now))
                self._wait(host, SOON_S if patience_s is None else patience_s)
            now = time.monotonic()
            host.began.append(now)
            return now

    def _comes_soon(self, host: _Host, now: float) -> bool:
        if self._most_waiting is not None and host.waiting >= self._most_waiting:
            return False
        return (host.waiting + 1) * host.pace_s(now, self._turns) <= SOON_S

    def _wait(self, host: _Host, seconds: float) -> None:
        host.waiting += 1
        has_turn = self._changed.wait_for(lambda: len(host.began) < self._turns, seconds)
        host.waiting -= 1
        if not has_turn:
            raise HostBusy(self._deal(host, time.monotonic()))

    def _deal(self, host: _Host, now: float) -> float:
        earliest = max(host.dealt_until, now + SHORTEST_S)
        host.dealt_until = min(earliest + host.pace_s(now, self._turns), now + LONGEST_S)
        return min(earliest - now, LONGEST_S)

    def _end(self, name: str, began: float) -> None:
        with self._changed:
            host, now = self._hosts[name], time.monotonic()
            host.began.remove(began)
            host.usual_s += (now - began - host.usual_s) / 4
            if not host.began and not host.waiting and now > host.dealt_until:
                del self._hosts[name]
            self._changed.notify_all()
