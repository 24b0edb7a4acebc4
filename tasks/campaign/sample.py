"""Chooses the rows of a campaign that are run to forecast it: in one pass over the table, with bounded memory. Pure.

Each row gets a random key. The sample is the rows with the smallest keys of the whole table, and with the smallest
keys of each of the larger hosts. So the chosen rows of a host are those with its smallest keys, which is a uniform
sample of its rows, whose weight is the host's rows divided by the chosen ones.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

#: The share of the rows that is run by default, and the bounds of their number.
SHARE, MIN_ROWS, MAX_ROWS = 0.01, 500, 5_000
#: Rows of each larger host that are run at least; together at most as many as all others.
HOST_ROWS = 8
#: Hosts of which rows are kept while the table is read: twice as many at times.
KEPT_HOSTS = 1_000
#: Hosts whose rows are counted one by one.
COUNTED_HOSTS = 200_000
#: Parts of the table, whose mixtures of hosts are known. A table sorted by host takes longer than a mixed one.
PARTS = 128
#: All smaller hosts together.
OTHERS = "*"


class _Pick(NamedTuple):
    """A row in a heap: the largest key is first."""

    negative_key: float
    number: int
    host: str


@dataclass(frozen=True, slots=True)
class Sample:
    """The chosen rows, and what is known of the whole table."""

    #: Valid rows of the table.
    rows: int
    #: The group of each chosen row by its number, in the order of the table: a host, OTHERS or NO_HOST.
    chosen: dict[int, str]
    #: Rows of each group.
    hosts: dict[str, int]
    #: Hosts in OTHERS.
    other_hosts: int
    #: Rows of each group in each part of the table, in order.
    parts: list[dict[str, int]] = field(default_factory=list)


class Sampler:
    """Takes each row's number and host, in order."""

    def __init__(self, seed: int, size: int | None = None) -> None:
        """`size`: the number of rows to choose, without those added for larger hosts. Default: a SHARE."""
        # Not the numbers that a table may be made with from the same seed.
        self._random = random.Random(f"sample {seed}")  # noqa: S311 - statistics
        self._size = size
        self._uniform: list[_Pick] = []
        self._by_host: dict[str, list[_Pick]] = {}
        self._counts: Counter[str] = Counter()
        self._uncounted = 0
        self._parts = _Parts()
        self.rows = 0

    def add(self, number: int, host: str) -> None:
        """Add a valid row. `host`: see host_of."""
        self.rows += 1
        if host in self._counts or len(self._counts) < COUNTED_HOSTS:
            self._counts[host] += 1
        else:
            self._uncounted += 1
        pick = _Pick(-self._random.random(), number, host)
        _keep(self._uniform, pick, self._size or MAX_ROWS)
        _keep(self._by_host.setdefault(host, []), pick, HOST_ROWS)
        if len(self._by_host) > 2 * KEPT_HOSTS:
            self._drop_small_hosts()
        self._parts.add(host)

    def finish(self) -> Sample:
        """The sample."""
        size = self._size or min(max(MIN_ROWS, round(self.rows * SHARE)), MAX_ROWS)
        picked = {pick.number: pick.host for pick in heapq.nlargest(size, self._uniform)}
        known = [host for host, _ in self._counts.most_common(max(1, size // HOST_ROWS)) if host in self._by_host]
        picked |= {pick.number: host for host in known for pick in self._by_host[host]}
        hosts = {host: self._counts[host] for host in known}
        others = self.rows - sum(hosts.values())
        return Sample(
            rows=self.rows,
            chosen={number: picked[number] if picked[number] in hosts else OTHERS for number in sorted(picked)},
            hosts=hosts | ({OTHERS: others} if others else {}),
            other_hosts=len(self._counts) - len(hosts) + self._uncounted,
            parts=self._parts.grouped(set(hosts)),
        )

    def _drop_small_hosts(self) -> None:
        """Forget the rows of the hosts with the fewest; a host that grows later is sampled from there on."""
        largest = heapq.nlargest(KEPT_HOSTS, self._by_host, key=lambda host: self._counts[host])
        self._by_host = {host: self._by_host[host] for host in largest}
        self._parts.keep(self._by_host)


def _keep(heap: list[_Pick], pick: _Pick, most: int) -> None:
    """Keep the picks with the smallest keys."""
    if len(heap) < most:
        heapq.heappush(heap, pick)
    elif pick > heap[0]:
        heapq.heapreplace(heap, pick)


class _Parts:
    """Counts hosts in equal parts of a table of unknown length: at most PARTS of them."""

    def __init__(self) -> None:
        #: Rows of a part, and of the last one.
        self._length, self._filled = 1, 0
        self._counts: list[Counter[str]] = [Counter()]

    def add(self, host: str) -> None:
        if self._filled == self._length:
            self._begin()
        self._counts[-1][host] += 1
        self._filled += 1

    def _begin(self) -> None:
        """Begin a part; if there are too many, each two become one."""
        if len(self._counts) == PARTS:
            pairs = zip(self._counts[::2], self._counts[1::2], strict=True)
            self._counts = [one + other for one, other in pairs]
            self._length *= 2
        self._counts.append(Counter())
        self._filled = 0

    def keep(self, hosts: Container[str]) -> None:
        """Count all hosts but some together in the last part: the earlier ones did it in their time."""
        self._counts[-1] = _grouped(self._counts[-1], hosts)

    def grouped(self, hosts: Container[str]) -> list[dict[str, int]]:
        """The parts, with all hosts but some as OTHERS."""
        return [dict(_grouped(counts, hosts)) for counts in self._counts if counts]


def _grouped(counts: Counter[str], hosts: Container[str]) -> Counter[str]:
    groups: Counter[str] = Counter()
    for host, count in counts.items():
        groups[host if host in hosts else OTHERS] += count
    return groups
