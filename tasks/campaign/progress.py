"""How far a campaign is: counts, the rate of late, and the time that is left. Pure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from .record import CampaignProgress
from .state import MAX_HOSTS, Counts

#: Seconds over which the rate is smoothed: an answer's weight falls to a third in that time.
SMOOTHING_S = 30.0


class Rate:
    """Events a second, smoothed exponentially."""

    def __init__(self, now: float) -> None:
        self._started = self._at = now
        self._weighted = 0.0

    def add(self, count: int, now: float) -> None:
        """`count` events since the last call, at time.monotonic() `now`."""
        seconds = now - self._at
        if seconds <= 0:
            self._weighted += count / SMOOTHING_S
            return
        fade = math.exp(-seconds / SMOOTHING_S)
        self._weighted = self._weighted * fade + count * (1 - fade) / seconds
        self._at = now

    @property
    def per_s(self) -> float:
        """Without the bias that the time before the first event would give."""
        seen = 1 - math.exp(-(self._at - self._started) / SMOOTHING_S)
        return self._weighted / seen if seen > 0 else 0.0


@dataclass(slots=True)
class Tally:
    """Answered rows; failed ones by code and host."""

    done: int = 0
    by_code: Counter[str] = field(default_factory=Counter)
    by_host: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(counts: Counts) -> Tally:
        return Tally(counts.done, Counter(counts.by_code), Counter(counts.by_host))

    @property
    def failed(self) -> int:
        return self.by_code.total()

    def add(self, code: str | None, host: str | None, times: int = 1) -> None:
        """Count an answer, or with `times` -1 take it back."""
        self.done += times
        if code is None:
            return
        self.by_code[code] += times
        if host is not None and (host in self.by_host or len(self.by_host) < MAX_HOSTS):
            self.by_host[host] += times


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A running campaign, for its display."""

    #: Rows of the input; None while they are being counted.
    rows: int | None
    #: Rows with an answer, and rows that --only-new leaves out.
    done: int
    left_out: int
    #: Failed rows by code, and by the host of their image, the most frequent first.
    by_code: dict[str, int]
    by_host: dict[str, int]
    in_flight: int
    #: Answers a second, smoothed.
    rate: float
    #: What bounds the rate: hosts, queue, model, producer; empty while it is not known.
    bound: str
    #: Why it waits; empty if it does not.
    trouble: str
    is_paused: bool

    @property
    def failed(self) -> int:
        return sum(self.by_code.values())

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the end; None if unknown."""
        if self.rows is None or self.rate <= 0 or self.is_paused:
            return None
        return max(0, self.rows - self.left_out - self.done) / self.rate

    def reported(self) -> CampaignProgress:
        """For the campaign's record in Redis."""
        return CampaignProgress(
            rows=None if self.rows is None else self.rows - self.left_out,
            done=self.done,
            failed=self.failed,
            failures=self.by_code,
            in_flight=self.in_flight,
            rate=round(self.rate, 2),
            bound=self.bound,
            left_s=self.left_s,
        )
