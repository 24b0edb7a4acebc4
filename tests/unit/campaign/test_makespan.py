"""How long a campaign takes, by what bounds it."""

from __future__ import annotations

import math

import pytest

from tasks.campaign.makespan import Bounds, Cause, HostLoad, makespan

FAST = HostLoad(slots=8, download_s=0.01, lasting_s=0.02, longest_s=0.02)
#: 10 rows a second.
SLOW = HostLoad(slots=8, download_s=0.8, lasting_s=0.9, longest_s=0.9)
BOUNDS = Bounds(rows_per_s=100, is_models=True, downloads=64, window=1_000)


def test_nothing_takes_no_time() -> None:
    assert makespan([], {}, BOUNDS).seconds == 0


def test_the_workers_bound_rows_of_fast_hosts() -> None:
    found = makespan([{"fast": 1_000}] * 10, {"fast": FAST}, BOUNDS)
    assert found.seconds == pytest.approx(100, rel=0.01)
    assert max(found.causes, key=lambda cause: found.causes[cause]) == Cause("model")


def test_a_slow_host_bounds_a_mixed_table() -> None:
    found = makespan([{"fast": 800, "slow": 200}] * 10, {"fast": FAST, "slow": SLOW}, BOUNDS)
    assert found.seconds == pytest.approx(2_000 / 10, rel=0.02)
    assert found.causes[Cause("host", "slow")] > found.seconds / 2


def test_a_slow_host_that_is_done_in_time_does_not_show() -> None:
    found = makespan([{"fast": 950, "slow": 50}] * 10, {"fast": FAST, "slow": SLOW}, BOUNDS)
    assert found.seconds == pytest.approx(100, rel=0.02)


def test_in_a_sorted_table_hosts_come_one_after_the_other() -> None:
    loads = {"fast": FAST, "slow": SLOW}
    mixed = makespan([{"fast": 500, "slow": 50}] * 20, loads, BOUNDS)
    in_order = makespan([{"fast": 550}] * 18 + [{"slow": 550}] * 2, loads, BOUNDS)
    # Of the slow host's 1,100 rows, the workers can do nothing else meanwhile.
    assert in_order.seconds == pytest.approx(9_900 / 100 + 1_100 / 10, rel=0.05)
    assert mixed.seconds == pytest.approx(110, rel=0.02)


def test_a_large_window_lets_a_host_fall_behind() -> None:
    parts = [{"slow": 500}, *[{"fast": 1_000}] * 10]
    loads = {"fast": FAST, "slow": SLOW}
    narrow = makespan(parts, loads, Bounds(100, True, 64, window=50))
    wide = makespan(parts, loads, BOUNDS)
    assert narrow.seconds > wide.seconds + 30


def test_downloads_of_all_hosts_are_bounded() -> None:
    loads = {str(number): HostLoad(8, 2.0, 2.0, 2.0) for number in range(100)}
    found = makespan([dict.fromkeys(loads, 10)], loads, BOUNDS)
    assert found.causes[Cause("downloads")] == pytest.approx(1_000 * 2.0 / 64)


def test_jobs_in_flight_bound_rows_that_last_long() -> None:
    loads = {"local": HostLoad(math.inf, 0.0, 60.0, 60.0)}
    found = makespan([{"local": 10_000}], loads, BOUNDS)
    assert found.causes[Cause("window")] == pytest.approx(10_000 * 60 / 1_000)


def test_the_last_retries_come_at_the_end() -> None:
    dead = HostLoad(slots=8, download_s=80, lasting_s=90, longest_s=95)
    found = makespan([{"fast": 990, "dead": 8}], {"fast": FAST, "dead": dead}, BOUNDS)
    # All eight at once, after their turn has come.
    assert 80 <= found.seconds <= 80 + 95 + 10
