"""Limits on downloads at once from one host."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.waiting import SOON_S, eventually
from worker.images.host_leases import Lease, LeaseRequest
from worker.images.host_limits import (
    LEASE_WAIT_S,
    MAX_COUNTDOWN_S,
    MAX_WAIT_S,
    MIN_COUNTDOWN_S,
    HostLimiter,
    HostLimitReached,
)
from worker.images.parking import ParkedJobs


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
        assert time.monotonic() - started < 3 * MAX_WAIT_S
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


# Parked jobs


class Parent:
    """The process that keeps parked jobs: what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.parked = ParkedJobs(lambda host, most: self.asked.append((host, most)), most=3)


def park(hosts: HostLimiter, parked: ParkedJobs, host: str = "slow.test") -> None:
    with pytest.raises(HostLimitReached) as reached, hosts.acquire(host, may_park=True):
        pass
    assert reached.value.may_park
    parked.add(host)


def test_a_job_is_parked_until_a_slot_of_its_host_is_free() -> None:
    parent = Parent()
    hosts = HostLimiter(1, download_s=5.0, parked=parent.parked)
    with hosts.acquire("slow.test"):
        park(hosts, parent.parked)
        hosts.resume_parked("slow.test")
        assert parent.asked == []
    assert parent.asked == [("slow.test", 1)]
    # A job that comes meanwhile does not overtake it a second time.
    with hosts.acquire("slow.test", may_park=True):
        pass
    assert parent.parked.hosts == []


def test_a_new_job_does_not_overtake_parked_ones_though_a_slot_is_free() -> None:
    parent = Parent()
    hosts = HostLimiter(2, download_s=5.0, parked=parent.parked)
    parent.parked.add("slow.test")
    park(hosts, parent.parked)
    with hosts.acquire("other.test", may_park=True), hosts.acquire("slow.test"):
        pass


def test_more_jobs_than_may_be_parked_are_sent_back_behind_the_parked_ones() -> None:
    parent = Parent()
    hosts = HostLimiter(1, download_s=5.0, parked=parent.parked)
    with hosts.acquire("slow.test"):
        for _ in range(3):
            park(hosts, parent.parked)
        with pytest.raises(HostLimitReached) as reached, hosts.acquire("slow.test", may_park=True):
            pass
    assert not reached.value.may_park
    assert reached.value.countdown == pytest.approx(15.0, abs=0.2)


def test_a_job_that_was_asked_for_and_does_not_come_is_no_longer_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = Parent()
    hosts = HostLimiter(1, download_s=5.0, parked=parent.parked)
    parent.parked.add("slow.test")
    parent.parked.add("slow.test")
    hosts.resume_parked("slow.test")
    hosts.resume_parked("slow.test")
    assert parent.asked == [("slow.test", 1)]
    monkeypatch.setattr("worker.images.parking.COMING_S", 0.0)
    hosts.resume_parked("slow.test")
    assert parent.asked == [("slow.test", 1)] * 2


def test_of_a_host_with_short_downloads_some_jobs_wait_in_threads() -> None:
    parent = Parent()
    hosts = HostLimiter(1, max_waiting=2, download_s=0.1, parked=parent.parked)
    with hosts.acquire("quick.test"):
        for _ in range(3):
            parent.parked.add("quick.test")
        hosts.resume_parked("quick.test")
        assert parent.asked == [("quick.test", 2)]


# Slots that workers share


class Redis:
    """The broker: leases a number of slots at each request, by a thread of its own."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.hosts = HostLimiter(4, ask_for_lease=lambda: self.asked.set())
        self.requests: list[LeaseRequest] = []
        self.asked = threading.Event()

    def answer(self, lease: Lease | None = None) -> None:
        requests = self.hosts.lease_requests()
        self.requests += requests
        self.hosts.leased(requests, [lease or Lease(min(self.slots, each.wanted)) for each in requests])

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Answer each request at once."""
        ended = threading.Event()

        def loop() -> None:
            while not ended.is_set():
                if self.asked.wait(0.01):
                    self.asked.clear()
                    self.answer()

        with ThreadPoolExecutor(1) as threads:
            loops = threads.submit(loop)
            try:
                yield
            finally:
                ended.set()
                loops.result()


def test_a_worker_leases_slots_as_it_needs_them_and_gives_them_up_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.images.host_limits.RENEW_S", 0.0)
    redis = Redis(slots=4)
    with redis.answering(), redis.hosts.acquire("a.test"), redis.hosts.acquire("a.test"):
        pass
    assert [(each.used, each.wanted) for each in redis.requests] == [(0, 1), (1, 2)]
    redis.answer()
    redis.answer()
    assert redis.requests[-1].wanted == 0
    assert redis.hosts.known_hosts == 0


def test_a_job_waits_while_other_workers_have_all_slots() -> None:
    redis = Redis(slots=0)
    with (
        redis.answering(),
        pytest.raises(HostLimitReached),
        redis.hosts.acquire("a.test"),
    ):
        pass
    # Not a second time, as long as workers lack slots.
    redis.hosts.leased([LeaseRequest("a.test", 0, 1)], [Lease(0, is_contended=True)])
    started = time.monotonic()
    with pytest.raises(HostLimitReached), redis.hosts.acquire("a.test"):
        pass
    assert time.monotonic() - started < LEASE_WAIT_S


def test_a_smaller_share_takes_effect_as_downloads_end() -> None:
    redis = Redis(slots=2)
    with redis.answering():
        first = redis.hosts.acquire("a.test")
        first.__enter__()
        with redis.hosts.acquire("a.test"):
            redis.hosts.leased([LeaseRequest("a.test", 2, 2)], [Lease(1, is_contended=True)])
        with pytest.raises(HostLimitReached), redis.hosts.acquire("a.test", wait_s=0.01):
            pass
        first.__exit__(None, None, None)
        with redis.hosts.acquire("a.test", wait_s=0.01):
            pass


def test_without_an_answer_a_worker_keeps_to_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.images.host_limits.LEASE_WAIT_S", 0.05)
    redis = Redis(slots=4)
    held = []
    for number in range(4):
        held.append(redis.hosts.acquire(f"{number % 2}.test"))
        held[-1].__enter__()
    assert redis.hosts.lease_requests() == []
    redis.hosts.lost_leases()
    with ExitStack() as slots:
        for _ in range(4):
            slots.enter_context(redis.hosts.acquire("new.test"))
        with pytest.raises(HostLimitReached), redis.hosts.acquire("new.test", wait_s=0.01):
            pass


# Hosts that ask to be left alone


def test_a_host_that_asks_for_a_pause_is_left_alone_and_other_workers_are_told() -> None:
    redis = Redis(slots=4)
    with redis.answering():
        redis.hosts.close("a.test", 60)
        with pytest.raises(HostLimitReached) as reached, redis.hosts.acquire("a.test", wait_s=1):
            pass
    assert reached.value.countdown == pytest.approx(61, abs=1)
    assert redis.requests[0].closed_s == pytest.approx(60, abs=1)
    with pytest.raises(HostLimitReached), redis.hosts.acquire("a.test"):
        pass


def test_another_workers_pause_counts_here_and_parked_jobs_wait_for_its_end() -> None:
    parent = Parent()
    hosts = HostLimiter(4, parked=parent.parked)
    with hosts.acquire("a.test"):
        hosts.leased([LeaseRequest("a.test", 1, 1)], [Lease(4, closed_s=0.2)])
        park(hosts, parent.parked, "a.test")
    hosts.resume_parked("a.test")
    assert parent.asked == []
    eventually(lambda: hosts.resume_parked("a.test") or parent.asked, SOON_S)
