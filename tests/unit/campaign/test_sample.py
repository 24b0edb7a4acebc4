"""The rows that a campaign is forecast from: a uniform sample, with some of each larger host, in bounded memory."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest

from tasks.campaign import sample as module
from tasks.campaign.sample import HOST_ROWS, MAX_ROWS, MIN_ROWS, OTHERS, PARTS, Sample, Sampler


def sampled(hosts: list[str], seed: int = 0, size: int | None = None) -> Sample:
    sampler = Sampler(seed, size)
    for number, host in enumerate(hosts, 1):
        sampler.add(number, host)
    return sampler.finish()


def test_a_small_table_is_sampled_whole() -> None:
    sample = sampled(["a.example", "b.example", "a.example"])
    assert sample.chosen == {1: "a.example", 2: "b.example", 3: "a.example"}
    assert (sample.rows, sample.hosts, sample.other_hosts) == (3, {"a.example": 2, "b.example": 1}, 0)


def test_an_empty_table_gives_an_empty_sample() -> None:
    assert sampled([]) == Sample(0, {}, {}, 0, [])


@pytest.mark.parametrize(("rows", "chosen"), [(10_000, MIN_ROWS), (80_000, 800)])
def test_one_percent_is_chosen_within_bounds(rows: int, chosen: int) -> None:
    assert len(sampled(["a.example"] * rows).chosen) == chosen


def test_a_size_may_be_given() -> None:
    assert len(sampled(["a.example"] * 10_000, size=50).chosen) == 50
    assert len(sampled(["a.example"] * 10_000, size=2 * MAX_ROWS).chosen) == 10_000


def test_each_larger_host_has_some_rows_and_counts_for_all_of_them() -> None:
    hosts = ["large.example"] * 20_000 + ["small.example"] * 30
    random.Random(1).shuffle(hosts)
    sample = sampled(hosts)
    counts = Counter(sample.chosen.values())
    assert counts["small.example"] >= HOST_ROWS
    assert sample.hosts == {"large.example": 20_000, "small.example": 30}
    assert all(hosts[number - 1] == host for number, host in sample.chosen.items())


def test_the_smallest_hosts_are_one_group() -> None:
    hosts = [f"{number % 5_000}.example" for number in range(15_000)] + ["large.example"] * 1_000
    sample = sampled(hosts)
    assert sample.hosts["large.example"] == 1_000
    assert sum(sample.hosts.values()) == sample.rows == 16_000
    assert sample.other_hosts == 5_001 - (len(sample.hosts) - 1)
    assert Counter(sample.chosen.values())[OTHERS] > 300


def test_every_row_of_a_host_is_as_likely_as_the_others() -> None:
    hosts = ["large.example", "large.example", "large.example", "small.example"] * 100
    times: Counter[int] = Counter()
    for seed in range(300):
        times.update(sampled(hosts, seed, size=40).chosen.keys())
    for host, share in (("large.example", 0.1), ("small.example", None)):
        drawn = [times[number] for number, name in enumerate(hosts, 1) if name == host]
        first, second = statistics.fmean(drawn[: len(drawn) // 2]), statistics.fmean(drawn[len(drawn) // 2 :])
        assert first == pytest.approx(second, rel=0.2)
        assert share is None or statistics.fmean(drawn) == pytest.approx(300 * share, rel=0.1)
        # Of a binomial distribution, not of rows that are chosen always or never.
        assert statistics.pvariance(drawn) < 2 * statistics.fmean(drawn)


def test_the_same_seed_chooses_the_same_rows() -> None:
    hosts = [f"{number % 7}.example" for number in range(3_000)]
    assert sampled(hosts, 5) == sampled(hosts, 5)
    assert sampled(hosts, 5).chosen != sampled(hosts, 6).chosen


def test_parts_show_where_a_hosts_rows_are() -> None:
    sample = sampled(["first.example"] * 5_000 + ["second.example"] * 5_000)
    assert PARTS // 4 <= len(sample.parts) <= PARTS
    assert "second.example" not in sample.parts[0]
    assert "first.example" not in sample.parts[-1]
    for host, rows in sample.hosts.items():
        assert sum(part.get(host, 0) for part in sample.parts) == rows


def test_hosts_beyond_the_bounds_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_HOSTS", 20)
    monkeypatch.setattr(module, "COUNTED_HOSTS", 500)
    sampler = Sampler(0, size=100)
    for number in range(1, 3_001):
        sampler.add(number, f"{number}.example" if number <= 2_000 else f"late{number % 2}.example")
    sample = sampler.finish()
    assert sum(sample.hosts.values()) == 3_000
    assert sum(sum(part.values()) for part in sample.parts) == 3_000
