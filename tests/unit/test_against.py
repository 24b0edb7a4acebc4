"""The comparison of two commits."""

from __future__ import annotations

from benchmarks.against import ORDERS, WORKERS, ratios


def test_this_checkout_is_compared_with_the_mean_of_both_workers_of_the_other() -> None:
    assert ratios({"this": [12.0, 9.0], "other": [8.0, 8.0], "control": [12.0, 10.0]}) == {
        "this": "1.100 +- 0.100",
        "control": "1.375 +- 0.125",
    }


def test_each_worker_goes_in_each_place_equally_often() -> None:
    for place in range(len(WORKERS)):
        assert sorted(order[place] for order in ORDERS) == [0, 0, 1, 1, 2, 2]
