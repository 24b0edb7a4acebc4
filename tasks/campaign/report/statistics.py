"""Statistics of any number of rows in little memory. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: Bins of `Durations` in a decade: each is 2.3% wide.
BINS_A_DECADE = 100
#: Of these a plot's bar has so many.
BINS_A_BAR = 5
SCORE_BINS = 20
#: Columns of a plot over time.
MAX_COLUMNS = 160


class NameCounts:
    """Counts of names, of which only the first `most` different ones are kept: later ones count together."""

    OTHER = "(others)"

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        known = name in self._counts or len(self._counts) < self._most
        self._counts[name if known else self.OTHER] += count

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def top(self, most: int | None = None) -> list[tuple[str, int]]:
        """The most frequent names first; equal ones in alphabetical order."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return ordered if most is None else ordered[:most]


class Durations:
    """Seconds in logarithmic bins: quantiles are right within 1.2%."""

    #: Anything shorter counts as this long.
    LEAST_S = 1e-4

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._bins[math.floor(math.log10(max(seconds, self.LEAST_S)) * BINS_A_DECADE)] += 1

    @property
    def count(self) -> int:
        return self._bins.total()

    def quantile(self, part: float) -> float:
        """The seconds that a part of the durations, 0 to 1, does not exceed. There must be one duration at least."""
        wanted = max(math.ceil(part * self.count), 1)
        for number, held in sorted(self._bins.items()):
            wanted -= held
            if wanted <= 0:
                return _edge(number + 0.5)
        raise ValueError("there are no durations")

    def bars(self) -> list[tuple[float, float, int]]:
        """From, to and count of each bar of a histogram on a logarithmic axis, without gaps."""
        held: Counter[int] = Counter()
        for number, count in self._bins.items():
            held[number // BINS_A_BAR] += count
        return [
            (_edge(number * BINS_A_BAR), _edge((number + 1) * BINS_A_BAR), held[number])
            for number in (range(min(held), max(held) + 1) if held else ())
        ]


def _edge(number: float) -> float:
    return float(f"{10 ** (number / BINS_A_DECADE):.6g}")


class OverTime:
    """Counts of answered and failed rows by when they ended, in equal spans of time whose width adapts."""

    def __init__(self) -> None:
        #: Seconds: a power of two.
        self.width_s = 1
        self._spans: dict[int, list[int]] = {}
        self._first = self._last = 0

    def add(self, ended: float, has_failed: bool) -> None:
        span = math.floor(ended) // self.width_s
        if not self._spans:
            self._first = self._last = span
        self._first, self._last = min(self._first, span), max(self._last, span)
        self._spans.setdefault(span, [0, 0])[has_failed] += 1
        while self._last - self._first >= MAX_COLUMNS:
            self._widen()

    def _widen(self) -> None:
        self.width_s *= 2
        self._first, self._last = self._first // 2, self._last // 2
        wider: dict[int, list[int]] = {}
        for span, counts in self._spans.items():
            both = wider.setdefault(span // 2, [0, 0])
            both[0] += counts[0]
            both[1] += counts[1]
        self._spans = wider

    def as_dict(self) -> dict[str, Any] | None:
        if not self._spans:
            return None
        counts = [self._spans.get(span, [0, 0]) for span in range(self._first, self._last + 1)]
        return {
            "start": self._first * self.width_s,
            "width_s": self.width_s,
            "answered": [answered for answered, _ in counts],
            "failed": [failed for _, failed in counts],
        }


@dataclass
class Statistics:
    """All that a page says of all rows."""

    rows: int = 0
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    codes: NameCounts = field(default_factory=lambda: NameCounts(200))
    labels: NameCounts = field(default_factory=lambda: NameCounts(1_000))
    #: Rows by the host of their picture, and failed ones.
    hosts: NameCounts = field(default_factory=lambda: NameCounts(100_000))
    failed_hosts: NameCounts = field(default_factory=lambda: NameCounts(100_000))
    durations: Durations = field(default_factory=Durations)
    scores: Counter[int] = field(default_factory=Counter)
    over_time: OverTime = field(default_factory=OverTime)

    @property
    def open(self) -> int:
        """Rows without an answer or an error."""
        return self.rows - self.answered - self.failed

    def add_score(self, score: float) -> None:
        if 0 <= score <= 1:
            self.scores[min(int(score * SCORE_BINS), SCORE_BINS - 1)] += 1

    def as_dict(self) -> dict[str, Any]:
        """The page's data."""
        return {
            "totals": {
                "rows": self.rows,
                "answered": self.answered,
                "failed": self.failed,
                "open": self.open,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
            },
            "codes": _named(self.codes),
            "labels": _named(self.labels, 100),
            "hosts": list(self._hosts(100)),
            "latency": self._latency(),
            "scores": {"bins": [self.scores[number] for number in range(SCORE_BINS)]} if self.scores else None,
            "rate": self.over_time.as_dict(),
        }

    def _hosts(self, most: int) -> Iterator[dict[str, Any]]:
        for name, failed in self.failed_hosts.top(most):
            yield {"name": name, "failed": failed, "rows": max(self.hosts[name], failed)}

    def _latency(self) -> dict[str, Any] | None:
        if not self.durations.count:
            return None
        quantiles = {f"p{part}": self.durations.quantile(part / 100) for part in (50, 90, 99)}
        return {"bins": self.durations.bars(), **quantiles}


def _named(counts: NameCounts, most: int | None = None) -> list[dict[str, Any]]:
    return [{"name": name, "count": count} for name, count in counts.top(most)]
