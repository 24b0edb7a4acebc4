"""Campaigns on simulated hosts: each with its forecast from a sample, and with what comes true."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tasks.campaign.forecast import Forecast, forecast
from tasks.campaign.observation import Fleet, SampledJob
from tasks.campaign.sample import Sample, Sampler
from tasks.results import Result
from tests.support.campaign_simulation import Host, Row, Simulation, Workers

#: Jobs in flight.
WINDOW = 1_000


@dataclass(frozen=True)
class Campaign:
    """A forecast, and what came true."""

    forecast: Forecast
    seconds: float
    rows: list[Row]

    @property
    def error(self) -> float:
        """Of the forecast time, relative to the true one."""
        return self.forecast.seconds.value / self.seconds - 1

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not isinstance(row.outcome, Result)]

    @property
    def new_tokens(self) -> int:
        return sum(row.outcome.usage.completion_tokens for row in self.rows if isinstance(row.outcome, Result))


@cache
def campaign(world: int, rows: int) -> Campaign:
    """A campaign of so many rows, mixed, with the default sample. `world`: a number, for its hosts and workers."""
    chance = random.Random(f"world {world}")
    hosts, shares = hosts_of(chance)
    names = chance.choices(list(hosts), shares, k=rows)
    workers = Workers(model_s=chance.choice([0.02, 0.1, 0.2]))
    sample = sample_of(names)
    sampled, _ = simulated(hosts, workers, [names[number - 1] for number in sample.chosen], seed=1)
    found = forecast(sample, jobs_of(sample, sampled), Fleet(), window=WINDOW)
    true, seconds = simulated(hosts, workers, names, seed=2)
    return Campaign(found, seconds, true)


def hosts_of(chance: random.Random) -> tuple[dict[str, Host], list[float]]:
    """Fast hosts, a slow one, a dead one and a flaky one, with their shares."""
    fast = {
        f"fast{number}": Host(chance.uniform(0.02, 0.1), missing=chance.choice([0, 0.05, 0.2]))
        for number in range(chance.randint(3, 10))
    }
    others = {
        "slow": Host(chance.uniform(0.3, 1.5)),
        "dead": Host(1.0, is_dead=True),
        "flaky": Host(chance.uniform(0.05, 0.3), flaky=chance.uniform(0.2, 0.6)),
    }
    shares = [chance.uniform(1, 10) for _ in fast]
    return fast | others, [*shares, chance.uniform(0.5, 5), chance.choice([0.02, 0.1]), chance.uniform(1, 5)]


def simulated(hosts: dict[str, Host], workers: Workers, names: Sequence[str], seed: int) -> tuple[list[Row], float]:
    return Simulation(hosts, workers, WINDOW, random.Random(seed)).run(names)


def sample_of(names: Sequence[str], seed: int = 0) -> Sample:
    sampler = Sampler(seed)
    for number, name in enumerate(names, 1):
        sampler.add(number, name)
    return sampler.finish()


def jobs_of(sample: Sample, rows: Sequence[Row]) -> list[SampledJob]:
    """The sample's outcomes, each seen a little after its end."""
    jobs = []
    for host, row in zip(sample.chosen.values(), rows, strict=True):
        assert row.outcome is not None
        jobs.append(SampledJob(host, row.sent, row.ended + 0.05, row.outcome))
    return jobs
