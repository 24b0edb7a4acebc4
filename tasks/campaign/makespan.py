"""How long a campaign takes, by what bounds it in each part of its table. Pure.

Rows are sent in order, and at most `window` are in flight. So a host that is slower than the others does not hold them
up until the window is full of its rows; from then on the others wait for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

#: The share of the window that is left to a slow host's rows, however many others are in flight.
LEAST_SHARE = 0.1
#: Expected slow rows after which it is as likely as not that there was one: the last.
LIKELY_ROWS = 0.7
#: The share of the workers' time from which on it is a host's.
NEARLY = 0.9
#: Steps of the search for a part's seconds: each halves the error.
STEPS = 30

Kind = Literal["host", "model", "workers", "downloads", "window", "retries", "queue"]


class Cause(NamedTuple):
    """What a campaign waits for: see KINDS in tasks/cli/forecast.py."""

    kind: Kind
    #: Of the kind `host`.
    host: str | None = None


@dataclass(frozen=True, slots=True)
class HostLoad:
    """What the mean row of a host needs."""

    #: Simultaneous downloads from the host; may be infinite.
    slots: float
    #: Seconds of one of them.
    download_s: float
    #: Seconds from its start to its end.
    lasting_s: float
    #: The same of the slowest rows, and the share of such rows.
    longest_s: float
    long_share: float = 1.0

    @property
    def row_s(self) -> float:
        """Seconds between two rows if there are no other hosts."""
        return self.download_s / self.slots


@dataclass(frozen=True, slots=True)
class Bounds:
    """What all hosts share."""

    #: Rows that the workers run in a second.
    rows_per_s: float
    #: Whether it is the model that bounds them.
    is_models: bool
    #: Simultaneous downloads.
    downloads: float
    #: Rows in flight.
    window: float


@dataclass(frozen=True, slots=True)
class Makespan:
    """A campaign's seconds, and how many of them are due to each cause."""

    causes: dict[Cause, float]

    @property
    def seconds(self) -> float:
        return sum(self.causes.values())


def makespan(parts: Sequence[Mapping[str, float]], loads: Mapping[str, HostLoad], bounds: Bounds) -> Makespan:
    """The seconds for a table's parts, each with its rows by host, in order."""
    causes: defaultdict[Cause, float] = defaultdict(float)
    left: dict[str, float] = {}
    ends: list[float] = []
    for part in parts:
        seconds, cause = _shared(part, loads, bounds)
        waiting = {host: left.get(host, 0.0) + part.get(host, 0.0) for host in {*left, *part}}
        slow = {host: rows for host, rows in waiting.items() if rows * loads[host].row_s > seconds}
        room = _room(part, slow, seconds, loads, bounds)
        alone_s = {host: rows * loads[host].row_s for host, rows in waiting.items()}
        slowest = max(alone_s, key=lambda host: alone_s[host])
        if _left_rows(slow, seconds, loads) > room:
            seconds = _until_room(slow, seconds, loads, room)
            cause = Cause("host", slowest)
        elif cause.kind in ("model", "workers") and alone_s[slowest] > NEARLY * seconds:
            # The workers' speed was seen while they waited for this host.
            cause = Cause("host", slowest)
        causes[cause] += seconds
        left = {host: rows - seconds / loads[host].row_s for host, rows in slow.items()}
        left = {host: rows for host, rows in left.items() if rows > 0}
        ends.append((ends[-1] if ends else 0.0) + seconds)
    if parts:
        _finish(causes, _waits(left, loads), _tails(parts, ends, loads))
    return Makespan(dict(causes))


def _shared(part: Mapping[str, float], loads: Mapping[str, HostLoad], bounds: Bounds) -> tuple[float, Cause]:
    """The seconds of a part by all that hosts share."""
    rows = sum(part.values())
    download_s = sum(count * loads[host].download_s for host, count in part.items())
    lasting_s = sum(count * loads[host].lasting_s for host, count in part.items())
    return max(
        (rows / bounds.rows_per_s, Cause("model" if bounds.is_models else "workers")),
        (download_s / bounds.downloads, Cause("downloads")),
        (lasting_s / bounds.window, Cause("window")),
        key=lambda bound: bound[0],
    )


def _room(
    part: Mapping[str, float],
    slow: Mapping[str, float],
    seconds: float,
    loads: Mapping[str, HostLoad],
    bounds: Bounds,
) -> float:
    """Rows of slow hosts that may be in flight beside those of the others."""
    lasting_s = sum(count * loads[host].lasting_s for host, count in part.items() if host not in slow)
    others = lasting_s / seconds if seconds else 0.0
    return max(LEAST_SHARE * bounds.window, bounds.window - others)


def _left_rows(slow: Mapping[str, float], seconds: float, loads: Mapping[str, HostLoad]) -> float:
    return sum(max(0.0, rows - seconds / loads[host].row_s) for host, rows in slow.items())


def _until_room(slow: Mapping[str, float], seconds: float, loads: Mapping[str, HostLoad], room: float) -> float:
    """The seconds after which no more than `room` rows of slow hosts are left."""
    low, high = seconds, max(rows * loads[host].row_s for host, rows in slow.items())
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _left_rows(slow, middle, loads) > room else (low, middle)
    return high


def _waits(left: Mapping[str, float], loads: Mapping[str, HostLoad]) -> dict[str, tuple[float, float]]:
    """By host: seconds until its rows that wait are downloaded, and those of its last row's retries."""
    return {
        host: (rows * loads[host].row_s, loads[host].lasting_s - loads[host].download_s) for host, rows in left.items()
    }


def _tails(
    parts: Sequence[Mapping[str, float]], ends: Sequence[float], loads: Mapping[str, HostLoad]
) -> dict[str, float]:
    """By host: seconds from the last part's end to that of its last slow row, if it starts as soon as it is sent."""
    tails = {}
    for host in {host for part in parts for host in part}:
        load, expected, index = loads[host], 0.0, len(parts)
        while index and expected < LIKELY_ROWS:
            index -= 1
            expected += parts[index].get(host, 0.0) * load.long_share
        tails[host] = ends[index] + load.longest_s - ends[-1]
    return tails


def _finish(
    causes: defaultdict[Cause, float], waits: Mapping[str, tuple[float, float]], tails: Mapping[str, float]
) -> None:
    """Add the seconds from the last part's end to the campaign's."""
    ends = [*waits.items(), *((host, (0.0, max(0.0, tail))) for host, tail in tails.items())]
    host, (queued_s, tail_s) = max(ends, key=lambda end: sum(end[1]))
    causes[Cause("host", host)] += queued_s
    causes[Cause("retries")] += tail_s
