"""Limits on downloads at once from one host."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.images.host_limits import MAX_COUNTDOWN_S, MIN_COUNTDOWN_S, HostLimiter, HostLimitReached


def test_a_fast_host_never_exceeds_its_limit_and_no_job_is_sent_back() -> None:
    hosts, lock, now, most = HostLimiter(2), threading.Lock(), 0, 0

    def download(_: int) -> None:
        nonlocal now, most
        with hosts.acquire("fast.test"):
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= 1

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(download, range(60)))
    assert most == 2
    assert hosts.known_hosts == 0


def test_a_job_that_would_wait_long_is_sent_back_at_once_with_a_countdown_and_other_hosts_are_not_delayed() -> None:
    hosts = HostLimiter(1, download_s=5.0)
    with hosts.acquire("slow.test"):
        started = time.monotonic()
        countdowns = []
        for _ in range(3):
            with pytest.raises(HostLimitReached) as busy, hosts.acquire("slow.test"):
                pass
            countdowns.append(busy.value.countdown)
        with hosts.acquire("other.test"):
            pass
        assert time.monotonic() - started < 0.5
    assert countdowns == pytest.approx([MIN_COUNTDOWN_S, MIN_COUNTDOWN_S + 5, MIN_COUNTDOWN_S + 10], abs=0.2)


def test_waiting_threads_are_bounded() -> None:
    hosts = HostLimiter(1, max_waiting=2)
    with ThreadPoolExecutor(2) as threads:
        with hosts.acquire("quick.test"):
            later = [threads.submit(lambda: hosts.acquire("quick.test").__enter__()) for _ in range(2)]
            while hosts.in_use < 3:
                time.sleep(0.01)
            with pytest.raises(HostLimitReached), hosts.acquire("quick.test"):
                pass
        assert [future.exception(timeout=2) for future in later] == [None, None]


def test_a_countdown_is_bounded() -> None:
    hosts = HostLimiter(1, download_s=1_000.0)
    with hosts.acquire("slow.test"):
        for _ in range(5):
            with pytest.raises(HostLimitReached) as busy, hosts.acquire("slow.test"):
                pass
            assert busy.value.countdown <= MAX_COUNTDOWN_S


def test_a_caller_may_choose_to_wait_for_a_slow_host() -> None:
    hosts = HostLimiter(1, download_s=9.0)
    with ThreadPoolExecutor(1) as threads:
        with hosts.acquire("slow.test"):
            later = threads.submit(lambda: hosts.acquire("slow.test", wait_s=5).__enter__())
            time.sleep(0.05)
            assert not later.done()
        later.result(timeout=2)
