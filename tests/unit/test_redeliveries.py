"""Counted deliveries, on a real server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tasks.redis_keys import REDELIVERIES
from worker.demo import stack
from worker.queue.redeliveries import KEPT_S, History, Key, RedeliveryCounter


def of(server: redis.Redis) -> RedeliveryCounter:
    deliveries = RedeliveryCounter(most=3)
    deliveries.channel = SimpleNamespace(pool=server.connection_pool, global_keyprefix="mine:", visibility_timeout=60)
    return deliveries


@pytest.fixture
def server(broker: stack.Broker) -> Iterator[redis.Redis]:
    with broker.connect() as server:
        yield server


@pytest.fixture
def deliveries(server: redis.Redis) -> RedeliveryCounter:
    return of(server)


@pytest.fixture
def key() -> Key:
    return uuid.uuid4().hex, 0


@pytest.fixture
def come_back(server: redis.Redis) -> Callable[[Key], None]:
    """What the transport does."""
    return lambda key: server.hincrby(f"mine:{REDELIVERIES.named(key[0])}", str(key[1]), 1)


def test_a_job_that_never_came_back_has_no_history(deliveries: RedeliveryCounter, key: Key) -> None:
    assert deliveries.history(key) == History(0, 0)


def test_the_first_return_is_a_death_and_later_ones_are_where_the_job_had_started(
    deliveries: RedeliveryCounter, key: Key, come_back: Callable[[Key], None], server: redis.Redis
) -> None:
    come_back(key)
    assert deliveries.history(key) == History(1, 1)
    # It waited in a worker that died.
    come_back(key)
    assert deliveries.history(key) == History(2, 1)
    deliveries.mark_started([(key, 2), ((uuid.uuid4().hex, 0), 1)])
    assert deliveries.history(key) == History(2, 1)
    come_back(key)
    assert deliveries.history(key) == History(3, 2)
    assert 0 < server.ttl(f"mine:{REDELIVERIES.named(key[0])}") <= KEPT_S + 60


def test_a_job_returned_in_order_had_not_started(
    deliveries: RedeliveryCounter, key: Key, come_back: Callable[[Key], None]
) -> None:
    come_back(key)
    deliveries.mark_started([(key, 1)])
    deliveries.unmark_started([(key, 1)])
    come_back(key)
    assert deliveries.history(key) == History(2, 1)


def test_a_job_whose_end_cannot_be_stored_counts_as_lost(deliveries: RedeliveryCounter, key: Key) -> None:
    for deaths in (1, 2, 3):
        deliveries.count_return(key)
        assert deliveries.history(key) == History(deaths, deaths)


def test_each_retry_is_a_series_of_its_own(
    deliveries: RedeliveryCounter, key: Key, come_back: Callable[[Key], None]
) -> None:
    come_back(key)
    assert deliveries.history((key[0], 1)) == History(0, 0)


@pytest.mark.parametrize(
    ("most", "alone", "lost"), [(2, [1, 2, 3, 4], [2, 3, 4]), (3, [2, 3, 4], [3, 4]), (4, [2, 3, 4], [4])]
)
def test_a_job_runs_alone_before_it_is_given_up(most: int, alone: list[int], lost: list[int]) -> None:
    deliveries = RedeliveryCounter(most=most)
    assert [deaths for deaths in range(5) if deliveries.is_suspect(deaths)] == alone
    assert [deaths for deaths in range(5) if deliveries.is_lost(deaths)] == lost


def test_without_redis_a_job_runs_uncounted(key: Key) -> None:
    for deliveries in (RedeliveryCounter(most=3), of(redis.Redis(port=stack.free_port(), retry=Retry(NoBackoff(), 0)))):
        deliveries.mark_started([(key, 1)])
        deliveries.mark_started([])
        assert deliveries.history(key) == History(0, 0)
