"""Permits to run Python: how many threads hold one, and that none waits forever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from worker.runtime import gil


@pytest.fixture(autouse=True)
def one_permit() -> Iterator[None]:
    gil.set_permits(1)
    yield
    gil.set_permits(1)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def _run(entered: threading.Semaphore, leave: threading.Event, *, waits: bool = False) -> None:
    with gil.held():
        entered.release()
        if waits:
            with gil.released():
                leave.wait(10)
        else:
            leave.wait(10)


def test_no_more_threads_run_than_there_are_permits(threads: ThreadPoolExecutor) -> None:
    gil.set_permits(2)
    entered, leave = threading.Semaphore(0), threading.Event()
    running = [threads.submit(_run, entered, leave) for _ in range(3)]
    assert entered.acquire(timeout=5)
    assert entered.acquire(timeout=5)
    assert not entered.acquire(timeout=0.1)
    leave.set()
    assert entered.acquire(timeout=5)
    assert [each.result(5) for each in running] == [None] * 3


def test_a_thread_that_waits_lets_others_run(threads: ThreadPoolExecutor) -> None:
    entered, leave = threading.Semaphore(0), threading.Event()
    running = [threads.submit(_run, entered, leave, waits=True) for _ in range(3)]
    for _ in running:
        assert entered.acquire(timeout=0.5)
    leave.set()
    assert [each.result(5) for each in running] == [None] * 3


def test_a_permit_is_released_after_an_error(threads: ThreadPoolExecutor) -> None:
    def fail() -> None:
        with gil.held(), gil.released():
            raise ValueError("a defect")

    failed: Future[None] = threads.submit(fail)
    with pytest.raises(ValueError, match="a defect"):
        failed.result(5)
    entered, leave = threading.Semaphore(0), threading.Event()
    leave.set()
    threads.submit(_run, entered, leave).result(0.5)


def test_no_thread_waits_forever_for_one_that_hangs(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gil, "MAX_WAIT_S", 0.05)
    entered, leave = threading.Semaphore(0), threading.Event()
    running = [threads.submit(_run, entered, leave) for _ in range(2)]
    assert entered.acquire(timeout=5)
    assert entered.acquire(timeout=5)
    leave.set()
    assert [each.result(5) for each in running] == [None] * 2
    # The thread that ran without a permit has none to release.
    entered, leave = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(gil, "MAX_WAIT_S", 5)
    running = [threads.submit(_run, entered, leave) for _ in range(2)]
    assert entered.acquire(timeout=5)
    assert not entered.acquire(timeout=0.1)
    leave.set()


def test_a_thread_without_a_permit_releases_none(threads: ThreadPoolExecutor) -> None:
    with gil.released():
        pass
    with gil.held():
        pass
    with gil.released():
        pass
    entered, leave = threading.Semaphore(0), threading.Event()
    leave.set()
    threads.submit(_run, entered, leave).result(0.5)
