"""The throughput of an engine, measured when rows end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from worker.engine.row import Row

#: Weight of the newest value in moving averages.
NEWEST_WEIGHT = 0.1
#: Seconds after the last row's end in which the weight of the measured time halves.
HALF_LIFE_S = 5.0


class Throughput(NamedTuple):
    """The number of rows that an engine runs, and the time that they take."""

    #: Running rows, and rows more that could start at once.
    capacity: int
    #: Average number of rows that run at once while others wait.
    width: float
    #: Seconds that a row takes once it has started; 0 before the first.
    job_s: float
    #: Seconds until a batch that no row may join is expected to end; 0 if rows may join.
    closed_s: float = 0.0


class ThroughputMeter:
    """Measures an engine's throughput. Updated in the engine thread; `throughput` may be read in any thread."""

    def __init__(self, max_rows: int) -> None:
        #: Whether rows may join the running ones.
        self.is_joinable = False
        self._running: Sequence[Row] = ()
        #: Additional rows that could start at once.
        self._free = max_rows
        self._width = float(max_rows)
        #: Moving average of the seconds that a row takes.
        self._job_s = 0.0
        self._ended_at = float("-inf")

    @property
    def throughput(self) -> Throughput:
        """The throughput now."""
        running, now = self._running, time.monotonic()
        age_s = now - sum(row.started for row in running) / len(running) if running else 0.0
        # An old average is a poor estimate for new jobs.
        usual_s = self._job_s * 2 ** ((self._ended_at - now) / HALF_LIFE_S)
        left_s = usual_s - age_s if usual_s > age_s else age_s
        closed_s = 0.0 if self.is_joinable or not running else left_s
        return Throughput(len(running) + self._free, self._width, max(usual_s, age_s), closed_s)

    @property
    def running(self) -> int:
        """Number of running rows."""
        return len(self._running)

    def update(self, running: Sequence[Row], free: int, *, others_wait: bool) -> None:
        """Record the running rows, the number of rows that could start at once, and whether others wait."""
        known = set(running)
        for row in self._running:
            if row not in known:
                self._record_end(row)
        self._running, self._free = tuple(running), free
        if others_wait:
            self._width += (len(running) - self._width) * NEWEST_WEIGHT
        else:
            self._width = max(self._width, len(running))

    def idle(self, free: int) -> None:
        """Record that no row runs. `free`: the number of rows that could start at once."""
        for row in self._running:
            self._record_end(row)
        self._running, self._free = (), free

    def _record_end(self, row: Row) -> None:
        now = time.monotonic()
        forgotten = 1 - 2 ** ((self._ended_at - now) / HALF_LIFE_S)
        self._job_s += (now - row.started - self._job_s) * max(NEWEST_WEIGHT, forgotten)
        self._ended_at = now
