"""The poller for cancellations: it finds, it never makes anybody wait, and it outlives an outage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import pytest

from tasks.redis_keys import CANCELLATION
from tests.support.waiting import eventually
from worker.queue.cancellation import CancellationPoller, canceled_among

SOON = 5.0


def poller(look: Callable[[Iterable[str]], set[str]]) -> CancellationPoller:
    found = CancellationPoller(look, pause_s=0.01)
    found.start()
    return found


def test_the_keys_of_all_jobs_are_asked_for_at_once() -> None:
    asked: list[list[str]] = []

    class Backend:
        class client:  # noqa: N801 - Celery's name
            @staticmethod
            def mget(keys: list[str]) -> list[bytes | None]:
                asked.append(keys)
                return [b"1" if key.endswith("b") else None for key in keys]

    assert canceled_among(["a", "b"], Backend) == {"b"}
    assert canceled_among([], Backend) == set()
    assert asked == [[CANCELLATION.named("a"), CANCELLATION.named("b")]]


def test_canceled_jobs_are_found_among_those_of_each_exchange() -> None:
    watched = poller(lambda ids: set(ids) & {"a", "z"})
    eventually(lambda: watched.exchange(["a", "b"]) == {"a"})
    eventually(lambda: watched.exchange(["z"]) == {"z"})


def test_a_hanging_redis_does_not_block_the_caller() -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def look(ids: Iterable[str]) -> set[str]:
        hangs.set()
        goes_on.wait(SOON)
        return set(ids)

    watched = poller(look)
    assert hangs.wait(SOON)
    began = time.monotonic()
    assert watched.exchange(["a"]) == set()
    assert time.monotonic() - began < SOON / 2
    goes_on.set()
    eventually(lambda: watched.exchange(["a"]) == {"a"})


def test_an_outage_is_logged_once_and_polling_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    failures = iter(range(5))

    def look(ids: Iterable[str]) -> set[str]:
        if next(failures, None) is not None:
            raise ConnectionError("refused")
        return set(ids)

    watched = poller(look)
    eventually(lambda: watched.exchange(["a"]) == {"a"})
    assert caplog.text.count("Cancellations cannot be polled (refused)") == 1
