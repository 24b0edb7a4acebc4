"""What a report says of all rows, and which of them it shows."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tasks.campaign.report.sampling import MAX_KINDS, Sampler, fair_shares
from tasks.campaign.report.statistics import MAX_COLUMNS, SCORE_BINS, Durations, NameCounts, OverTime, Statistics


def _chosen(limit: int, kinds: list[str | None]) -> Counter[str | None]:
    sampler = Sampler(limit)
    for row, kind in enumerate(kinds, start=1):
        sampler.add(row, kind)
    return Counter(kinds[row - 1] for row in sampler.chosen())


def test_all_rows_are_shown_where_there_is_room() -> None:
    assert _chosen(10, [None] * 6 + ["a"] * 4) == {None: 6, "a": 4}


def test_half_of_a_sample_is_for_failed_rows_in_fair_shares() -> None:
    assert _chosen(100, [None] * 5_000 + ["often"] * 900 + ["seldom"] * 3) == {None: 50, "often": 47, "seldom": 3}


def test_few_failures_are_all_shown_and_leave_their_places() -> None:
    assert _chosen(100, [None] * 5_000 + ["a"] * 3) == {None: 97, "a": 3}


def test_where_most_rows_have_failed_the_others_are_all_shown() -> None:
    assert _chosen(100, [None] * 10 + ["a"] * 5_000) == {None: 10, "a": 90}


def test_the_sample_is_the_same_each_time_and_from_all_parts() -> None:
    def chosen() -> set[int]:
        sampler = Sampler(200)
        for row in range(1, 20_001):
            sampler.add(row, None)
        return sampler.chosen()

    rows = chosen()
    assert rows == chosen()
    assert len(rows) == 200
    quarters = Counter((row - 1) // 5_000 for row in rows)
    assert min(quarters[quarter] for quarter in range(4)) > 25


def test_any_number_of_codes_needs_room_for_some() -> None:
    sampler = Sampler(10)
    for row in range(1, 1_001):
        sampler.add(row, f"code {row}")
    assert len(sampler.chosen()) == 10
    assert sum(_chosen(2 * MAX_KINDS, [f"code {row}" for row in range(1_000)]).values()) <= 2 * MAX_KINDS


def test_no_share_is_lost() -> None:
    assert fair_shares({"a": 1, "b": 100, "c": 100}, 21) == {"a": 1, "b": 10, "c": 10}
    assert fair_shares({"a": 1, "b": 2}, 100) == {"a": 1, "b": 2}
    assert fair_shares({}, 5) == {}


def test_quantiles_are_right_within_their_bins() -> None:
    numbers = random.Random(7)
    durations, exact = Durations(), sorted(numbers.lognormvariate(0, 1) for _ in range(5_000))
    for seconds in exact:
        durations.add(seconds)
    for part in (0.5, 0.9, 0.99):
        assert durations.quantile(part) == pytest.approx(exact[int(part * len(exact)) - 1], rel=0.02)
    bars = durations.bars()
    assert sum(count for *_, count in bars) == 5_000
    assert bars[0][0] <= exact[0]
    assert exact[-1] <= bars[-1][1]
    assert [start for start, *_ in bars[1:]] == [end for _, end, _ in bars[:-1]]


def test_no_time_at_all_has_its_place() -> None:
    durations = Durations()
    durations.add(0.0)
    assert durations.quantile(0.5) == pytest.approx(Durations.LEAST_S, rel=0.02)
    assert Durations().bars() == []


def test_columns_of_time_become_wider_as_time_goes_on() -> None:
    over_time, began = OverTime(), 1_800_000_000.0
    ends = list(range(0, 10_000, 7))
    random.Random(1).shuffle(ends)
    for end in ends:
        over_time.add(began + end, end % 2 == 1)
    told = over_time.as_dict()
    assert told is not None
    assert len(told["answered"]) == len(told["failed"]) <= MAX_COLUMNS
    assert told["start"] <= began < told["start"] + told["width_s"]
    assert sum(told["answered"]) == sum(end % 2 == 0 for end in ends)
    assert sum(told["failed"]) == sum(end % 2 == 1 for end in ends)
    first = range(int(told["start"] + told["width_s"] - began))
    assert told["answered"][0] + told["failed"][0] == sum(end in first for end in ends)


def test_names_beyond_the_first_ones_count_together() -> None:
    counts = NameCounts(2)
    for name in ("b", "a", "c", "d", "a"):
        counts.add(name)
    assert counts.top() == [("(others)", 2), ("a", 2), ("b", 1)]


def test_scores_fall_into_bins_and_nonsense_into_none() -> None:
    statistics = Statistics()
    for score in (0.0, 0.049, 0.05, 1.0, 1.5, -1.0):
        statistics.add_score(score)
    assert statistics.as_dict()["scores"]["bins"] == [2, 1, *[0] * (SCORE_BINS - 3), 1]
    assert Statistics().as_dict()["scores"] is None
    assert Statistics().as_dict()["latency"] is None
