"""Turns at an image's host."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.images.host_limits import LONGEST_S, SHORTEST_S, HostBusy, Hosts


def test_a_fast_host_is_never_asked_by_more_than_its_turns_and_nobody_is_sent_away() -> None:
    hosts, lock, now, most = Hosts(2), threading.Lock(), 0, 0

    def download(_: int) -> None:
        nonlocal now, most
        with hosts.turn("fast.test"):
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= 1

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(download, range(60)))
    assert most == 2
    assert hosts._hosts == {}


def test_who_would_wait_long_is_sent_away_at_once_and_told_when_to_come_and_others_are_not_held() -> None:
    hosts = Hosts(1)
    with hosts.turn("slow.test"):
        hosts._hosts["slow.test"].usual_s = 5.0
        started = time.monotonic()
        countdowns = []
        for _ in range(3):
            with pytest.raises(HostBusy) as busy, hosts.turn("slow.test"):
                pass
            countdowns.append(busy.value.countdown)
        with hosts.turn("other.test"):
            pass
        assert time.monotonic() - started < 0.5
    assert countdowns == pytest.approx([SHORTEST_S, SHORTEST_S + 5, SHORTEST_S + 10], abs=0.2)


def test_no_more_threads_wait_than_may() -> None:
    hosts = Hosts(1, most_waiting=2)
    with ThreadPoolExecutor(2) as threads:
        with hosts.turn("quick.test"):
            later = [threads.submit(lambda: hosts.turn("quick.test").__enter__()) for _ in range(2)]
            while hosts._hosts["quick.test"].waiting < 2:
                time.sleep(0.01)
            with pytest.raises(HostBusy), hosts.turn("quick.test"):
                pass
        assert [future.exception(timeout=2) for future in later] == [None, None]


def test_no_countdown_is_longer_than_the_longest() -> None:
    hosts = Hosts(1)
    with hosts.turn("slow.test"):
        hosts._hosts["slow.test"].usual_s = 1_000.0
        for _ in range(5):
            with pytest.raises(HostBusy) as busy, hosts.turn("slow.test"):
                pass
            assert busy.value.countdown <= LONGEST_S


def test_a_patient_one_waits_for_a_slow_host() -> None:
    hosts = Hosts(1)
    with ThreadPoolExecutor(1) as threads:
        with hosts.turn("slow.test"):
            hosts._hosts["slow.test"].usual_s = 9.0
            later = threads.submit(lambda: hosts.turn("slow.test", patience_s=5).__enter__())
            time.sleep(0.05)
            assert not later.done()
        later.result(timeout=2)
