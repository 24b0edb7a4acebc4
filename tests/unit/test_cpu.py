"""On which cores the model process's threads run, and which goes first."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.runtime.cpu import ENGINE_NICENESS, decoding_cores, go_last, job_cores, on_decoding_cores


@pytest.mark.parametrize(
    ("cores", "expected"),
    [({0}, [0]), ({0, 1}, [1]), ({4, 5, 6}, [5, 6]), (range(4), [2, 3]), (range(16), [*range(2, 16)])],
)
def test_job_threads_leave_cores_to_the_engine_and_always_have_one(cores: set[int], expected: list[int]) -> None:
    assert job_cores(cores) == expected


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (7, [*range(7)]), (16, [*range(2, 16)])])
def test_decoding_uses_all_cores_or_of_many_all_but_two(count: int, expected: list[int]) -> None:
    assert decoding_cores(range(count)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_one_thread_goes_last_and_the_others_stay_as_they_were() -> None:
    def of_this_thread() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = of_this_thread()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(go_last).result()
        assert pool.submit(of_this_thread).result() == ENGINE_NICENESS
    assert of_this_thread() == before


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound to cores on Linux only")
def test_a_thread_bound_to_one_core_decodes_on_others_too() -> None:
    every = os.sched_getaffinity(0)
    one, decoding = {min(every)}, set(decoding_cores(every))

    def cores_of_this_thread() -> list[set[int]]:
        os.sched_setaffinity(threading.get_native_id(), one)
        found = []
        with pytest.raises(ValueError, match="broken"), on_decoding_cores():  # noqa: PT012
            found.append(os.sched_getaffinity(threading.get_native_id()))
            raise ValueError("broken")
        return [*found, os.sched_getaffinity(threading.get_native_id())]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cores_of_this_thread).result() == [decoding, one]
