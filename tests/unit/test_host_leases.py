"""Slots of a host that workers lease in Redis: never more than there are, and an even share for each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.support.waiting import SOON_S, eventually
from worker.demo import stack
from worker.images import host_leases
from worker.images.host_leases import HostLeases, Lease, LeaseRequest, key_of


@pytest.fixture
def server(broker: stack.Broker) -> Iterator[redis.Redis]:
    with broker.connect() as server:
        server.flushall()
        yield server


class Worker:
    """A worker that uses all slots that it gets, at once."""

    def __init__(self, server: redis.Redis, total: int) -> None:
        self._leases = HostLeases(lambda: (server, "shop:"), total)
        self.used = 0

    def lease(self, wanted: int, closed_s: float = 0.0, used: int | None = None) -> Lease:
        used = self.used if used is None else used
        (lease,) = self._leases.exchange([LeaseRequest("a.test", used, wanted, closed_s)])
        self.used = lease.slots
        return lease


def test_one_worker_gets_what_it_wants_up_to_all_slots(server: redis.Redis) -> None:
    worker = Worker(server, 8)
    assert worker.lease(3) == Lease(3)
    assert worker.lease(9) == Lease(8, is_contended=True)


def test_a_second_worker_gets_its_half_once_the_first_ones_downloads_have_ended(server: redis.Redis) -> None:
    first, second = Worker(server, 8), Worker(server, 8)
    first.lease(8)
    assert second.lease(8) == Lease(0, is_contended=True)
    # Eight downloads are under way, and no further one begins before four have ended.
    assert first.lease(8).slots == 4
    first.lease(8, used=6)
    assert second.lease(8).slots == 2
    first.lease(8, used=4)
    assert second.lease(8).slots == 4


@pytest.mark.parametrize(
    ("total", "wants", "shares"),
    [
        (8, [8, 8], [4, 4]),
        (8, [2, 8], [2, 6]),
        (8, [1, 2, 8], [1, 2, 5]),
        (8, [8, 8, 8], [3, 3, 2]),
        (8, [3, 3], [3, 3]),
        (1, [4], [1]),
    ],
)
def test_shares_are_even_and_no_slot_is_left(
    server: redis.Redis, total: int, wants: list[int], shares: list[int]
) -> None:
    workers = [Worker(server, total) for _ in wants]
    for _ in range(4):
        for worker, want in zip(workers, wants, strict=True):
            worker.lease(want, used=0)
    assert sorted(worker.used for worker in workers) == sorted(shares)


def test_more_workers_than_slots_take_turns(server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_leases, "TURN_S", 0.05)
    workers = [Worker(server, 2) for _ in range(5)]
    had: set[int] = set()

    def all_had_one() -> bool:
        for number, worker in enumerate(workers):
            if worker.lease(3).slots:
                had.add(number)
        assert sum(worker.used for worker in workers) <= 2
        return len(had) == 5

    eventually(all_had_one, SOON_S)


def test_a_worker_that_died_loses_its_slots(server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_leases, "LEASE_S", 0.2)
    Worker(server, 8).lease(8)
    survivor = Worker(server, 8)
    assert survivor.lease(8).slots == 0
    eventually(lambda: survivor.lease(8).slots == 8, SOON_S)


def test_a_lease_that_is_given_up_leaves_nothing_behind(server: redis.Redis) -> None:
    worker = Worker(server, 8)
    worker.lease(2)
    ttl: Any = server.pttl("shop:" + key_of("a.test"))
    assert 0 < ttl <= 1000 * host_leases.LEASE_S
    worker.lease(0, used=0)
    assert server.keys() == []


def test_a_pause_that_one_worker_was_asked_for_is_known_to_all(server: redis.Redis) -> None:
    Worker(server, 8).lease(0, closed_s=60.0)
    ttl: Any = server.ttl("shop:" + key_of("a.test"))
    assert 50 < ttl <= 60
    other = Worker(server, 8)
    assert 50 < other.lease(1).closed_s <= 60
    # A shorter one does not end it.
    assert 50 < other.lease(1, closed_s=1.0).closed_s <= 60


def test_a_pause_ends(server: redis.Redis) -> None:
    worker = Worker(server, 8)
    worker.lease(1, closed_s=0.05)
    time.sleep(0.1)
    assert worker.lease(1).closed_s == 0


def test_keys_are_of_one_length_and_form(server: redis.Redis) -> None:
    names = {key_of(host) for host in ("a.test", "x" * 10_000, "\ud800", "a:b\n*", "")}
    assert len(names) == 5
    assert {len(name) for name in names} == {len("idefics:host:") + 32}


def test_an_error_of_redis_is_the_callers_and_the_next_call_connects_anew() -> None:
    connections = []

    def connect() -> tuple[redis.Redis, str]:
        connections.append(redis.Redis(port=1))
        return connections[-1], ""

    leases = HostLeases(connect, 8)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            leases.exchange([LeaseRequest("a.test", 0, 1)])
    assert len(connections) == 2
