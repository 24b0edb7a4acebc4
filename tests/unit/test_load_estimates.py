"""Whether jobs are better left to other workers: the estimates, and what is told in Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from tasks.redis_keys import LOAD
from worker.demo import stack
from worker.queue.load_balancing import FRESH_S, MAX_LEAVE_S, TAKE_ALL_S, LeaveLimit, LoadExchange, LoadReport
from worker.queue.load_estimates import Load, leaves_to_others, surplus

INFINITE = float("inf")
#: Sixteen jobs in 0.25 s, and in ten times as long.
FAST, SLOW = Load(16, 0.25, 0), Load(16, 2.5, 0)


def holding(load: Load, unbegun: int) -> Load:
    return Load(load.width, load.job_s, unbegun, load.is_open)


# Taking


def test_the_only_worker_takes_everything() -> None:
    for queued in (0, 1, 10_000):
        assert not leaves_to_others(holding(SLOW, 1_000), [], queued)
        assert surplus(holding(SLOW, 1_000), [], queued) == 0


def test_a_slow_worker_helps_with_a_long_queue_and_leaves_its_end_to_the_fast() -> None:
    assert not leaves_to_others(SLOW, [FAST, FAST], 1_000)
    assert leaves_to_others(SLOW, [FAST, FAST], 100)


def test_a_single_job_is_left_to_an_idle_faster_worker() -> None:
    assert leaves_to_others(holding(SLOW, -16), [holding(FAST, -16)], 1)
    assert not leaves_to_others(holding(FAST, -16), [holding(SLOW, -16)], 1)


def test_workers_alike_leave_each_other_nothing() -> None:
    for queued in (1, 10, 1_000):
        assert not leaves_to_others(holding(FAST, -16), [holding(FAST, -16)], queued)


def test_a_worker_full_of_jobs_leaves_one_to_an_idle_worker_as_fast() -> None:
    assert leaves_to_others(holding(FAST, 32), [holding(FAST, -16)], 1)


def test_nothing_is_left_to_workers_that_take_nothing() -> None:
    closed = Load(16, 0.25, -16, is_open=False)
    assert not leaves_to_others(SLOW, [closed], 1)
    assert surplus(holding(SLOW, 32), [closed], 0) == 0


def test_a_worker_without_a_known_throughput_takes_jobs() -> None:
    assert not leaves_to_others(Load(16, 0.0, -16), [holding(FAST, -16)], 1)


# Giving back


def test_jobs_waiting_in_a_slow_worker_go_to_idle_ones() -> None:
    assert surplus(holding(SLOW, 32), [holding(FAST, -16), holding(FAST, -16)], 0) == 32


def test_the_last_job_does_not_wait_for_a_slow_batch_that_it_cannot_join() -> None:
    nearly_done = holding(FAST, 64)
    assert surplus(Load(16, 2.5, 1, closed_s=2.0), [nearly_done], 0) == 1
    assert surplus(Load(16, 2.5, 1), [Load(16, 2.5, 16)], 0) == 0
    assert leaves_to_others(Load(16, 2.5, 0, closed_s=2.0), [Load(16, 2.5, 0)], 1)


def test_workers_alike_share_what_is_left() -> None:
    slow = holding(SLOW, 48)
    assert 16 <= surplus(slow, [holding(SLOW, -16)], 0) <= 40
    assert surplus(slow, [slow], 0) == 0


def test_a_job_that_begins_soon_is_kept() -> None:
    assert surplus(holding(FAST, 4), [holding(FAST, -16)], 0) == 0


def test_nothing_goes_back_while_the_queue_is_long() -> None:
    assert surplus(holding(SLOW, 32), [FAST, FAST], 5_000) == 0


def test_a_worker_that_can_begin_nothing_gives_all_of_it_back() -> None:
    loading = Load(1, INFINITE, 20, is_open=False)
    assert surplus(loading, [FAST], 5_000) == 20
    assert surplus(loading, [], 0) == 0


def test_a_hung_worker_that_has_run_no_job_causes_no_division_by_zero() -> None:
    unknown = Load(0, 0.0, 5)
    assert surplus(unknown, [unknown], 0) == 0
    assert not leaves_to_others(unknown, [unknown], 1)
    assert not leaves_to_others(SLOW, [Load(1, INFINITE, 3)], 1)


# LeaveLimit


def test_jobs_do_not_lie_in_the_queue_for_an_estimate() -> None:
    limit = LeaveLimit()
    assert limit.still_leaves(leaves=True, queued=1, job_s=0.1, now=0.0)
    assert limit.still_leaves(leaves=True, queued=1, job_s=0.1, now=MAX_LEAVE_S)
    assert not limit.still_leaves(leaves=True, queued=1, job_s=0.1, now=MAX_LEAVE_S + 0.1)
    assert not limit.still_leaves(leaves=True, queued=1, job_s=0.1, now=MAX_LEAVE_S + TAKE_ALL_S)
    assert limit.still_leaves(leaves=True, queued=1, job_s=0.1, now=MAX_LEAVE_S + TAKE_ALL_S + 0.2)


def test_leaving_jobs_has_no_limit_while_others_empty_the_queue() -> None:
    limit = LeaveLimit()
    for now in range(100):
        assert limit.still_leaves(leaves=True, queued=now % 2, job_s=0.1, now=float(now))


# What is told


@pytest.fixture
def server(broker: stack.Broker) -> Iterator[redis.Redis]:
    with broker.connect() as server:
        server.flushall()
        yield server


def report(load: Load, *, is_busy: bool = True) -> LoadReport:
    return LoadReport(load, is_busy, {"jobs": ["jobs", "jobs-1"]})


def test_workers_hear_of_each_other_and_of_the_queue(server: redis.Redis) -> None:
    one, other = (LoadExchange(lambda: (server, "app:")) for _ in range(2))
    server.lpush("app:jobs", "a", "b")
    server.lpush("app:jobs-1", "c")
    assert one.exchange(report(holding(SLOW, 7)))["jobs"].others == []
    heard = other.exchange(report(FAST))["jobs"]
    assert (heard.queued, heard.others) == (3, [holding(SLOW, 7)])
    assert one.exchange(report(SLOW))["jobs"].others == [FAST]
    assert 0 < server.pttl("app:" + LOAD.named("jobs")) < 60_000


def test_an_idle_fleet_writes_nothing(server: redis.Redis) -> None:
    one, other = (LoadExchange(lambda: (server, "")) for _ in range(2))
    for exchange in (one, other):
        exchange.exchange(report(FAST, is_busy=False))
    assert not server.exists(LOAD.named("jobs"))
    one.exchange(report(FAST))
    other.exchange(report(FAST, is_busy=False))
    assert server.hlen(LOAD.named("jobs")) == 2


def test_a_worker_that_falls_silent_counts_no_more(server: redis.Redis) -> None:
    one, other = (LoadExchange(lambda: (server, "")) for _ in range(2))
    one.exchange(report(FAST))
    time.sleep(FRESH_S + 0.1)
    assert other.exchange(report(SLOW))["jobs"].others == []
    assert server.hlen(LOAD.named("jobs")) == 1


def test_load_records_that_are_no_workers_are_dropped(server: redis.Redis) -> None:
    server.hset(LOAD.named("jobs"), "stranger", "garbage")
    assert LoadExchange(lambda: (server, "")).exchange(report(FAST))["jobs"].others == []
    assert server.hkeys(LOAD.named("jobs")) != [b"stranger"]
