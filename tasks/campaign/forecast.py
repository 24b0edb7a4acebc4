"""Forecasts a campaign from a sample of its rows: time, tokens, failures and cost, each with an interval. Pure.

The sample is stratified by host (`tasks/campaign/sample.py`): each row counts for as many rows of its host as it
stands for. Intervals are those of a Bayesian bootstrap: each draw weighs the sampled rows at random and computes the
whole forecast anew. A host whose few sampled rows all ended alike may still have others: to its rows each draw adds one
of the whole sample, with half a row's weight. Times have no such row, since one of a dead host would dominate them all.
A single host's failures have Jeffreys' interval, which is right for no failures, too.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .hosts import NO_HOST
from .makespan import Bounds, Cause, HostLoad, makespan
from .observation import DOWNLOAD_S, Fleet, Observation, SampledJob, Speed, observe
from .sample import OTHERS, Sample

#: Draws of the bootstrap, and the probability within an interval.
DRAWS, PROBABILITY = 200, 0.95
#: The weight of the row that is not the host's own.
PRIOR_ROWS = 0.5
#: Relative error of all speeds at least: a short sample does not show how they change over hours.
LEAST_SPEED_ERROR = 0.05
#: The slowest speed that a draw may have, as a share of the mean.
LEAST_SPEED = 0.3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A forecast value, and the interval that contains the true one with PROBABILITY."""

    value: float
    low: float
    high: float

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class HostForecast:
    """What is expected of one host."""

    #: OTHERS for all smaller ones together, NO_HOST for rows without a URL.
    host: str
    rows: int
    sampled: int
    failed: Estimate
    #: By error code.
    failures: dict[str, Estimate]
    #: Seconds that its rows take if nothing else bounds them.
    seconds: Estimate


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a campaign will take."""

    rows: int
    sampled: int
    workers: int
    seconds: Estimate
    prompt_tokens: Estimate
    completion_tokens: Estimate
    failed: Estimate
    #: By error code, the most frequent first.
    failures: dict[str, Estimate]
    #: The hosts that bound the time or fail most first.
    hosts: list[HostForecast]
    #: Rows a second while nothing but the workers bounds them.
    rows_per_s: float
    #: Seconds by what the campaign waits for, the longest first.
    causes: list[tuple[Cause, float]]

    @property
    def dominant(self) -> Cause | None:
        """What the campaign waits for most."""
        return self.causes[0][0] if self.causes else None

    def gpu_hours(self) -> Estimate:
        """Hours of all workers together."""
        return self.seconds * (self.workers / 3600)

    def cost(self, gpu_hour_price: float) -> Estimate:
        return self.gpu_hours() * gpu_hour_price

    def as_dict(self, gpu_hour_price: float | None = None) -> dict[str, Any]:
        """For JSON."""
        causes = [{**cause._asdict(), "seconds": seconds} for cause, seconds in self.causes]
        told = {**asdict(self), "causes": causes, "gpu_hours": asdict(self.gpu_hours())}
        return told if gpu_hour_price is None else {**told, "cost": asdict(self.cost(gpu_hour_price))}


@dataclass(slots=True)
class _Totals:
    """One draw, or the point estimate."""

    seconds: float
    prompt_tokens: float
    completion_tokens: float
    #: By host and code; under None those of all hosts, or with any code.
    failures: dict[tuple[str | None, str | None], float]
    host_seconds: dict[str, float]
    causes: dict[Cause, float]


def forecast(
    sample: Sample, jobs: Sequence[SampledJob], fleet: Fleet, *, window: int, queued: int = 0, seed: int = 0
) -> Forecast:
    """Forecast a campaign.

    `jobs`: the sample's, or those of it that ended in time; at least one. `window`: the campaign's jobs in flight.
    `queued`: jobs that wait in the queue and run before. Raises ValueError without jobs.
    """
    if not jobs:
        raise ValueError("no job of the sample has ended")
    observations, speed = observe(jobs, fleet)
    model = _Model(sample, observations, speed, fleet, window, queued)
    chance = random.Random(seed)  # noqa: S311 - statistics
    return model.forecast([model.draw(chance) for _ in range(DRAWS)])


class _Model:
    """A sample's observations by host, from which totals are computed."""

    def __init__(
        self,
        sample: Sample,
        observations: Sequence[Observation],
        speed: Speed,
        fleet: Fleet,
        window: int,
        queued: int,
    ) -> None:
        self._sample = sample
        self._all = observations
        self._speed, self._fleet, self._window, self._queued = speed, fleet, window, queued
        self._by_host: dict[str, list[Observation]] = {host: [] for host in sample.hosts}
        for each in observations:
            self._by_host[each.host].append(each)

    def point(self) -> _Totals:
        weights = {host: [1.0] * len(seen) for host, seen in self._by_host.items()}
        return self._totals(weights, {}, self._speed.rows_per_s)

    def draw(self, chance: random.Random) -> _Totals:
        weights = {host: [chance.expovariate(1.0) for _ in seen] for host, seen in self._by_host.items()}
        others = {host: (chance.choice(self._all), chance.gammavariate(PRIOR_ROWS, 1.0)) for host in self._by_host}
        error = math.hypot(self._speed.error, LEAST_SPEED_ERROR)
        rows_per_s = self._speed.rows_per_s * max(LEAST_SPEED, chance.gauss(1.0, error))
        return self._totals(weights, others, rows_per_s, chance)

    def _realised(self, host: str, code: str, expected: float, chance: random.Random) -> float:
        """A count as it may turn out: of the rows that were not sampled, each fails or not."""
        seen, unseen = self._seen(host, code)
        share = min(1.0, (expected - seen) / unseen) if unseen > 0 else 0.0
        return seen + _binomial(unseen, share, chance)

    def _seen(self, host: str, code: str | None) -> tuple[int, int]:
        """The sampled rows of a host that failed, with a code or any; and its rows that were not sampled."""
        rows = self._by_host[host]
        failed = sum(each.code is not None and code in (None, each.code) for each in rows)
        return failed, self._sample.hosts[host] - len(rows)

    def _totals(
        self,
        weights: Mapping[str, Sequence[float]],
        others: Mapping[str, tuple[Observation, float]],
        rows_per_s: float,
        chance: random.Random | None = None,
    ) -> _Totals:
        loads, tokens = {}, [0.0, 0.0]
        failures: defaultdict[tuple[str, str], float] = defaultdict(float)
        for host, seen in self._by_host.items():
            slowness = max(LEAST_SPEED, chance.gauss(1.0, LEAST_SPEED_ERROR)) if chance else 1.0
            loads[host] = self._load(host, seen, weights[host], slowness)
            rows = self._counted(host, seen, weights[host], others.get(host))
            for each, count in rows:
                tokens[0] += count * each.prompt_tokens
                tokens[1] += count * each.completion_tokens
                if each.code is not None:
                    failures[host, each.code] += count
        bounds = Bounds(rows_per_s, self._speed.is_models, self._fleet.downloads, self._window)
        causes = makespan(self._sample.parts, loads, bounds).causes
        if self._queued:
            causes[Cause("queue")] = self._queued / rows_per_s
        alone = {host: self._sample.hosts[host] * load.row_s for host, load in loads.items()}
        if chance:
            failures.update({key: self._realised(*key, count, chance) for key, count in failures.items()})
        return _Totals(sum(causes.values()), tokens[0], tokens[1], _with_sums(failures), alone, causes)

    def _counted(
        self,
        host: str,
        seen: Sequence[Observation],
        weights: Sequence[float],
        other: tuple[Observation, float] | None,
    ) -> list[tuple[Observation, float]]:
        """Each observation with the number of the host's rows that are like it: itself, and its part of the others."""
        weighted = list(zip(seen, weights, strict=True))
        unseen = self._sample.hosts[host] - len(seen)
        if not seen:
            # None of them has ended: they are taken for rows like all others.
            share = unseen / len(self._all)
            return [(each, share) for each in self._all]
        whole = sum(weights) + (other[1] if other else 0.0)
        rows = [(each, 1 + unseen * weight / whole) for each, weight in weighted]
        return [*rows, (other[0], unseen * other[1] / whole)] if other and whole else rows

    def _load(self, host: str, seen: Sequence[Observation], weights: Sequence[float], slowness: float) -> HostLoad:
        slots = _slots(host, self._sample, self._fleet)
        whole = sum(weights)
        if not whole:
            return HostLoad(slots, DOWNLOAD_S * slowness, DOWNLOAD_S, DOWNLOAD_S)
        download_s = sum(each.download_s * weight for each, weight in zip(seen, weights, strict=True)) / whole
        lasting_s = sum(each.lasting_s * weight for each, weight in zip(seen, weights, strict=True)) / whole
        longest_s = max(each.lasting_s for each in seen)
        long_share = sum(2 * each.lasting_s > longest_s for each in seen) / len(seen)
        return HostLoad(slots, download_s * slowness, lasting_s, longest_s, long_share)

    def forecast(self, draws: Sequence[_Totals]) -> Forecast:
        point = self.point()
        codes = [code for host, code in point.failures if host is None and code is not None]
        codes.sort(key=lambda code: point.failures[None, code], reverse=True)
        hosts = [self._host(host, point, draws) for host in self._by_host]
        hosts.sort(key=lambda each: (each.seconds.value, each.failed.value), reverse=True)
        return Forecast(
            rows=self._sample.rows,
            sampled=len(self._all),
            workers=self._fleet.workers,
            seconds=_estimate(point.seconds, [draw.seconds for draw in draws]),
            prompt_tokens=_estimate(point.prompt_tokens, [draw.prompt_tokens for draw in draws]),
            completion_tokens=_estimate(point.completion_tokens, [draw.completion_tokens for draw in draws]),
            failed=_failures(point, draws, None, None),
            failures={code: _failures(point, draws, None, code) for code in codes},
            hosts=hosts,
            rows_per_s=self._speed.rows_per_s,
            causes=sorted(point.causes.items(), key=lambda cause: cause[1], reverse=True),
        )

    def _host(self, host: str, point: _Totals, draws: Sequence[_Totals]) -> HostForecast:
        codes = sorted(code for of, code in point.failures if of == host and code is not None)
        return HostForecast(
            host=host,
            rows=self._sample.hosts[host],
            sampled=len(self._by_host[host]),
            failed=self._host_failures(point, host, None),
            failures={code: self._host_failures(point, host, code) for code in codes},
            seconds=_estimate(point.host_seconds[host], [draw.host_seconds[host] for draw in draws]),
        )

    def _host_failures(self, point: _Totals, host: str, code: str | None) -> Estimate:
        chance = random.Random(f"{host} {code}")  # noqa: S311 - statistics
        failed, unseen = self._seen(host, code)
        fine = len(self._by_host[host]) - failed
        shares = [chance.betavariate(failed + PRIOR_ROWS, fine + PRIOR_ROWS) for _ in range(DRAWS)]
        draws = [failed + _binomial(unseen, share, chance) for share in shares]
        return _estimate(point.failures.get((host, code), 0.0), draws)


def _binomial(trials: int, share: float, chance: random.Random) -> float:
    """A draw of a binomial distribution, approximately."""
    count = chance.gauss(trials * share, math.sqrt(max(0.0, trials * share * (1 - share))))
    return min(max(count, 0.0), float(trials))


def _slots(host: str, sample: Sample, fleet: Fleet) -> float:
    """Simultaneous downloads from a host, or a group of them."""
    if host == NO_HOST:
        return math.inf
    return fleet.host_slots * max(1, sample.other_hosts) if host == OTHERS else fleet.host_slots


def _with_sums(failures: Mapping[tuple[str, str], float]) -> dict[tuple[str | None, str | None], float]:
    sums: defaultdict[tuple[str | None, str | None], float] = defaultdict(float)
    for (host, code), count in failures.items():
        for key in ((host, code), (host, None), (None, code), (None, None)):
            sums[key] += count
    return dict(sums)


def _failures(point: _Totals, draws: Sequence[_Totals], host: str | None, code: str | None) -> Estimate:
    counts = [draw.failures.get((host, code), 0.0) for draw in draws]
    return _estimate(point.failures.get((host, code), 0.0), counts)


def _estimate(value: float, draws: Sequence[float]) -> Estimate:
    ordered = sorted(draws)
    tail = (1 - PROBABILITY) / 2
    low, high = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (tail, 1 - tail))
    return Estimate(value, min(value, low), max(value, high))
