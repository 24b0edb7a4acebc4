"""On which cores the model process's threads run, and which goes first."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.runtime.cpu import ENGINE_NICENESS, go_last, job_cores


@pytest.mark.parametrize(
    ("cores", "expected"),
    [({0}, [0]), ({0, 1}, [1]), ({4, 5, 6}, [5, 6]), (range(4), [2, 3]), (range(16), [*range(2, 16)])],
)
def test_job_threads_leave_cores_to_the_engine_and_always_have_one(cores: set[int], expected: list[int]) -> None:
    assert job_cores(cores) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_one_thread_goes_last_and_the_others_stay_as_they_were() -> None:
    def of_this_thread() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = of_this_thread()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(go_last).result()
        assert pool.submit(of_this_thread).result() == ENGINE_NICENESS
    assert of_this_thread() == before
