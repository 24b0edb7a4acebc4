"""The ideal that the benchmark of slow workers compares with."""

from __future__ import annotations

import pytest

from benchmarks.hoarding import ideal_s


@pytest.mark.parametrize(
    ("jobs", "batches_s", "seconds"),
    [
        (1, [1.0], 1.0),
        (16, [1.0], 1.0),
        (17, [1.0], 2.0),
        (32, [1.0, 1.0], 1.0),
        # The slow one is better left out.
        (48, [1.0, 1.0, 10.0], 2.0),
        (336, [1.0, 1.0, 10.0], 10.0),
    ],
)
def test_the_ideal_time_is_the_best_with_whole_batches(jobs: int, batches_s: list[float], seconds: float) -> None:
    assert ideal_s(jobs, batches_s, slots=16) == seconds
