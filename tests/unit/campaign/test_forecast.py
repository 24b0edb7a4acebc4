"""A forecast from a sample, against a simulation of the whole campaign that knows nothing of forecasts."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tasks.campaign.forecast import Estimate, Forecast, forecast
from tasks.campaign.makespan import Cause
from tasks.campaign.observation import Fleet
from tasks.results import Result
from tests.support.campaign_simulation import Host, Workers
from tests.support.campaign_worlds import WINDOW, campaign, jobs_of, sample_of, simulated

ROWS = 8_000
WORLDS = range(5)


def contains(estimate: Estimate, true: float) -> bool:
    return estimate.low <= true <= estimate.high


def test_the_time_is_right_within_15_percent() -> None:
    errors = {world: campaign(world, ROWS).error for world in WORLDS}
    assert all(abs(error) < 0.15 for error in errors.values()), errors


def test_tokens_are_right_within_5_percent() -> None:
    for world in WORLDS:
        found = campaign(world, ROWS)
        assert found.forecast.completion_tokens.value == pytest.approx(found.new_tokens, rel=0.05)


def test_intervals_contain_what_comes_true() -> None:
    contained: list[bool] = []
    for world in WORLDS:
        found = campaign(world, ROWS)
        codes = Counter(row.outcome.code for row in found.failed)  # type: ignore[union-attr]
        hosts = Counter(row.host for row in found.failed)
        contained += [contains(found.forecast.failed, len(found.failed))]
        contained += [contains(found.forecast.completion_tokens, found.new_tokens)]
        contained += [contains(estimate, codes[code]) for code, estimate in found.forecast.failures.items()]
        contained += [contains(each.failed, hosts[each.host]) for each in found.forecast.hosts]
    # Of 95 % intervals, a few miss.
    assert len(contained) > 40
    assert sum(contained) / len(contained) >= 0.9


def test_failures_are_told_by_code_and_host() -> None:
    found = campaign(0, ROWS).forecast
    by_host = {each.host: each for each in found.hosts}
    dead = by_host["dead"]
    assert dead.failures.keys() == {"image_unreachable"}
    assert dead.failed.value == dead.rows
    assert sum(each.rows for each in found.hosts) == found.rows == ROWS
    assert found.failed.value == pytest.approx(sum(each.failed.value for each in found.hosts))


def one_world(host: Host, workers: Workers, name: str = "host", **options: int) -> Forecast:
    names = [name] * 3_000
    sample = sample_of(names)
    rows, _ = simulated({name: host}, workers, [name] * len(sample.chosen), seed=3)
    return forecast(sample, jobs_of(sample, rows), Fleet(), window=WINDOW, **options)


def test_the_largest_cause_is_named() -> None:
    assert one_world(Host(1.0), Workers(model_s=0.01)).dominant == Cause("host", "host")
    assert one_world(Host(0.01), Workers(model_s=0.5, model_rows=4)).dominant == Cause("model")
    assert one_world(Host(0.05), Workers(), queued=1_000_000).dominant == Cause("queue")


def test_a_longer_queue_adds_its_jobs_time() -> None:
    free, queued = (one_world(Host(0.05), Workers(), queued=count) for count in (0, 3_000))
    assert queued.seconds.value - free.seconds.value == pytest.approx(3_000 / free.rows_per_s)


def test_cost_is_that_of_all_workers() -> None:
    found = one_world(Host(0.05), Workers())
    assert found.gpu_hours().value == pytest.approx(found.seconds.value / 3_600)
    assert found.cost(2.0) == found.gpu_hours() * 2.0
    told = json.loads(json.dumps(found.as_dict(2.0)))
    assert told["cost"]["value"] == pytest.approx(found.cost(2.0).value)
    assert "cost" not in found.as_dict()
    assert told["causes"][0].keys() == {"kind", "host", "seconds"}


def test_a_table_that_was_sampled_whole_has_certain_counts() -> None:
    names = ["host"] * 50
    sample = sample_of(names)
    rows, _ = simulated({"host": Host(0.1, missing=0.3)}, Workers(), names, seed=4)
    found = forecast(sample, jobs_of(sample, rows), Fleet(), window=WINDOW)
    failed = sum(not isinstance(row.outcome, Result) for row in rows)
    assert found.failed == Estimate(failed, failed, failed)


def test_a_host_none_of_whose_rows_ended_is_taken_for_the_others() -> None:
    names = ["seen", "unseen"] * 500
    sample = sample_of(names)
    rows, _ = simulated({"seen": Host(0.1), "unseen": Host(0.1)}, Workers(), names, seed=5)
    jobs = [job for job in jobs_of(sample, rows[: len(sample.chosen)]) if job.host == "seen"]
    found = forecast(sample, jobs, Fleet(), window=WINDOW)
    assert found.prompt_tokens.value == pytest.approx(20 * 1_000, rel=0.01)


def test_without_any_outcome_there_is_no_forecast() -> None:
    with pytest.raises(ValueError, match="no job"):
        forecast(sample_of(["host"]), [], Fleet(), window=WINDOW)
