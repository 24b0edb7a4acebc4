"""Which receivers answer: pure. Those that did are kept a share of the threads, so that others cannot hold them up.

A host name costs nothing: somebody may submit jobs with callbacks to hundreds that take a connection and never answer,
and each attempt at one of them occupies a thread until its timeout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from tasks.outbox import Shares

#: Hosts that are remembered, of each kind.
MOST = 1_000
#: Seconds that an answer may take for its host to count as one that answers.
QUICK_S = 1.0


class KnownHosts:
    """What the last attempts at each host met. Not for several threads at once."""

    def __init__(self, timeout_s: float, answered: Iterable[str] = ()) -> None:
        """`answered`: hosts that are known from before, the one that answered last at the end."""
        self._quick_s = min(QUICK_S, timeout_s / 2)
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._silent: OrderedDict[str, None] = OrderedDict()
        for host in answered:
            _remember(self._answered, host)

    def note(self, host: str, *, has_answered: bool, seconds: float) -> None:
        """An attempt has ended. What failed at once held no thread, and changes nothing."""
        if seconds <= self._quick_s:
            if has_answered:
                self._silent.pop(host, None)
                _remember(self._answered, host)
            return
        # One that answered until now is only unknown after its first silence: a restart may have cut it off.
        was_known = self._answered.pop(host, "") is None
        if has_answered or was_known:
            self._silent.pop(host, None)
        else:
            _remember(self._silent, host)

    def shares(self, threads: int, busy: Mapping[str, int]) -> Shares:
        """How many of the threads may go to hosts that are not known to answer, given those that are `busy`.

        Half of them, and silent ones half of those; all, while no host is known to answer.
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
    if len(hosts) > MOST:
        hosts.popitem(last=False)
