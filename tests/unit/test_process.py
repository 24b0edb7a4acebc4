"""What the model process decides before it serves."""

from __future__ import annotations

import pytest

from worker.pool.process import job_cores


@pytest.mark.parametrize(
    ("cores", "expected"),
    [({0}, [0]), ({0, 1}, [1]), ({4, 5, 6}, [5, 6]), (range(4), [2, 3]), (range(16), [*range(2, 16)])],
)
def test_job_threads_leave_cores_to_the_engine_and_always_have_one(cores: set[int], expected: list[int]) -> None:
    assert job_cores(cores) == expected
