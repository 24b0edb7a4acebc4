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
    #: Seconds from its start to its end, and those of the slowest rows.
    lasting_s: float
    longest_s: float

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
    for part in parts:
        seconds, cause = _shared(part, loads, bounds)
        waiting = {host: left.get(host, 0.0) + part.get(host, 0.0) for host in {*left, *part}}
        slow = {host: rows for host, rows in waiting.items() if rows * loads[host].row_s > seconds}
        room = _room(part, slow, seconds, loads, bounds)
        if _left_rows(slow, seconds, loads) > room:
            seconds = _until_room(slow, seconds, loads, room)
            cause = Cause("host", max(slow, key=lambda host: slow[host] * loads[host].row_s))
        causes[cause] += seconds
        left = {host: rows - seconds / loads[host].row_s for host, rows in slow.items()}
        left = {host: rows for host, rows in left.items() if rows > 0}
    _drain(causes, left, parts[-1] if parts else {}, loads, bounds)
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


def _drain(
    causes: defaultdict[Cause, float],
    left: Mapping[str, float],
    last: Mapping[str, float],
    loads: Mapping[str, HostLoad],
    bounds: Bounds,
) -> None:
    """Add the seconds from the last row's start to the end."""
    rows = sum(last.values())
    queued = {host: rows_left * loads[host].row_s for host, rows_left in left.items()}
    # Where rows wait for a host, the last of them only has the delays of its retries left when the others have ended.
    ends = {host: seconds + loads[host].lasting_s - loads[host].download_s for host, seconds in queued.items()}
    share = min(1.0, bounds.window / rows) if rows else 0.0
    for host, count in last.items():
        if count * share >= 1:
            ends[host] = max(ends.get(host, 0.0), queued.get(host, 0.0) + loads[host].longest_s)
    if not ends:
        return
    slowest = max(ends, key=lambda host: ends[host])
    queued_s = queued.get(slowest, 0.0)
    causes[Cause("host", slowest)] += queued_s
    causes[Cause("retries")] += max(0.0, ends[slowest] - queued_s)
