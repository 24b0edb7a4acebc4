"""Tracks which hosts answer callbacks, and reserves threads for those that do. Pure.

Host names are free: jobs may have callbacks to hundreds of hosts that accept a connection and never answer, and each
attempt at one of them occupies a thread until its timeout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from tasks.outbox import Shares

#: Hosts kept in memory, of each kind; the least recently noted one is dropped.
MAX_HOSTS = 1_000
#: Seconds within which a host must answer to count as one that answers.
QUICK_S = 1.0


class KnownHosts:
    """How the last attempts at each host ended. Not thread-safe."""

    def __init__(self, timeout_s: float, answered: Iterable[str] = ()) -> None:
        """`answered`: hosts known from an earlier run, the most recent one last."""
        self._quick_s = min(QUICK_S, timeout_s / 2)
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._silent: OrderedDict[str, None] = OrderedDict()
        for host in answered:
            _remember(self._answered, host)

    def note(self, host: str, *, has_answered: bool, seconds: float) -> None:
        """Record an attempt and the seconds it took. One that failed at once held no thread, and changes nothing."""
        if seconds <= self._quick_s:
            if has_answered:
                self._silent.pop(host, None)
                _remember(self._answered, host)
            return
        # A host that answered until now becomes unknown at its first silence, not silent: it may have been restarted.
        was_known = self._answered.pop(host, "") is None
        if has_answered or was_known:
            self._silent.pop(host, None)
        else:
            _remember(self._silent, host)

    def shares(self, threads: int, busy: Mapping[str, int]) -> Shares:
        """How many threads may go to hosts that are not known to answer, given the attempts that run (`busy`, by host).

        Half of the threads, and a quarter to silent hosts; all of them while no host is known to answer.
        """
        most = max(1, threads // 2) if self._answered else threads
        silent_most = max(1, threads // 4)
        others_busy = sum(count for host, count in busy.items() if host not in self._answered)
        silent_busy = sum(count for host, count in busy.items() if host in self._silent)
        return Shares(
            answered=frozenset(self._answered),
            silent=frozenset(self._silent),
            others=max(0, most - others_busy),
            silent_calls=max(0, silent_most - silent_busy),
        )


def _remember(hosts: OrderedDict[str, None], host: str) -> None:
    hosts[host] = None
    hosts.move_to_end(host)
    if len(hosts) > MAX_HOSTS:
        hosts.popitem(last=False)
