"""Counted deliveries, on a real server."""

from __future__ import annotations

import uuid

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.deliveries import DELIVERIES, Deliveries
from worker.demo import stack


@pytest.fixture
def deliveries(broker: stack.Broker) -> Deliveries:
    return Deliveries(lambda: broker.connect(1), most=3, ttl_s=60)


@pytest.fixture
def key() -> tuple[str, int]:
    return uuid.uuid4().hex, 0


def test_a_redelivered_job_was_started_before(deliveries: Deliveries, key: tuple[str, int]) -> None:
    assert deliveries.earlier(key) == 1


def test_every_start_counts(deliveries: Deliveries, key: tuple[str, int], broker: stack.Broker) -> None:
    deliveries.count([key])
    assert deliveries.earlier(key) == 2
    deliveries.count([key, (uuid.uuid4().hex, 0)])
    assert deliveries.earlier(key) == 3
    assert 0 < broker.connect(1).ttl(DELIVERIES + key[0]) <= 60


def test_what_a_worker_gives_back_is_taken_off(deliveries: Deliveries, key: tuple[str, int]) -> None:
    deliveries.count([key])
    deliveries.count([key], by=-1)
    deliveries.count([key], by=-1)
    assert deliveries.earlier(key) == 0


def test_each_retry_is_a_series_of_its_own(deliveries: Deliveries, key: tuple[str, int]) -> None:
    deliveries.count([key])
    assert deliveries.earlier((key[0], 1)) == 1


@pytest.mark.parametrize(
    ("most", "alone", "lost"), [(2, [1, 2, 3, 4], [2, 3, 4]), (3, [2, 3, 4], [3, 4]), (4, [2, 3, 4], [4])]
)
def test_a_job_runs_alone_before_it_is_given_up(
    broker: stack.Broker, most: int, alone: list[int], lost: list[int]
) -> None:
    deliveries = Deliveries(lambda: broker.connect(1), most=most, ttl_s=60)
    starts = range(5)
    assert [earlier for earlier in starts if deliveries.is_suspect(earlier)] == alone
    assert [earlier for earlier in starts if deliveries.is_lost(earlier)] == lost


def test_nothing_to_count_asks_nobody() -> None:
    def nobody() -> redis.Redis:
        raise AssertionError

    Deliveries(nobody, most=3, ttl_s=60).count([])


def test_without_redis_a_job_runs_uncounted(key: tuple[str, int]) -> None:
    away = redis.Redis(port=stack.free_port(), retry=Retry(NoBackoff(), 0))
    deliveries = Deliveries(lambda: away, most=3, ttl_s=60)
    deliveries.count([key])
    assert deliveries.earlier(key) == 1
