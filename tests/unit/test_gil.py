"""Turns at the interpreter: how many threads run, and that nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from worker.runtime import gil


@pytest.fixture(autouse=True)
def one_turn() -> Iterator[None]:
    gil.allow(1)
    yield
    gil.allow(1)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def _run(entered: threading.Semaphore, leave: threading.Event, *, waits: bool = False) -> None:
    with gil.taken():
        entered.release()
        if waits:
            with gil.given_up():
                leave.wait(10)
        else:
            leave.wait(10)


def test_only_so_many_run_at_a_time(threads: ThreadPoolExecutor) -> None:
    gil.allow(2)
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


def test_a_turn_comes_back_after_an_error(threads: ThreadPoolExecutor) -> None:
    def fail() -> None:
        with gil.taken(), gil.given_up():
            raise ValueError("a defect")

    failed: Future[None] = threads.submit(fail)
    with pytest.raises(ValueError, match="a defect"):
        failed.result(5)
    entered, leave = threading.Semaphore(0), threading.Event()
    leave.set()
    threads.submit(_run, entered, leave).result(0.5)


def test_nobody_waits_for_ever_for_one_that_hangs(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gil, "PATIENCE_S", 0.05)
    entered, leave = threading.Semaphore(0), threading.Event()
    running = [threads.submit(_run, entered, leave) for _ in range(2)]
    assert entered.acquire(timeout=5)
    assert entered.acquire(timeout=5)
    leave.set()
    assert [each.result(5) for each in running] == [None] * 2
    # The one that went on without a turn has none to give back.
    entered, leave = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(gil, "PATIENCE_S", 5)
    running = [threads.submit(_run, entered, leave) for _ in range(2)]
    assert entered.acquire(timeout=5)
    assert not entered.acquire(timeout=0.1)
    leave.set()


def test_outside_of_a_turn_there_is_none_to_give_up(threads: ThreadPoolExecutor) -> None:
    with gil.given_up():
        pass
    with gil.taken():
        pass
    with gil.given_up():
        pass
    entered, leave = threading.Semaphore(0), threading.Event()
    leave.set()
    threads.submit(_run, entered, leave).result(0.5)
