"""Waiting for Redis: a job's thread does, with few connections, and the parent process does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from celery import Celery

from worker.demo import stack
from worker.queue import redis_retry
from worker.queue.redis_retry import CONNECTIONS, RedisAway, RetryingRedis, with_retries
from worker.runtime import gil

AWAY = redis.ConnectionError("gone")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[float]]:
    """Let this process wait so many seconds; the list fills with the waits that it tells."""
    monkeypatch.setattr(redis_retry, "_waiting", redis_retry._Waiting())
    monkeypatch.setattr(redis_retry, "FIRST_PAUSE_S", 0.01)

    def allow(seconds: float) -> list[float]:
        told: list[float] = []
        redis_retry.enable(seconds, told.append)
        return told

    return allow


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_a_call_is_made_again_until_redis_is_back(waits: Callable[[float], list[float]]) -> None:
    told = waits(10)
    assert with_retries(failing(AWAY, redis.exceptions.OutOfMemoryError("full"), OSError(24, "fds"))) == "done"
    assert len(told) == 3
    assert 0.02 < sum(told) < 1


def test_a_wait_ends_in_an_error_that_except_exception_does_not_catch(waits: Callable[[float], list[float]]) -> None:
    waits(0.05)
    with pytest.raises(RedisAway) as raised:
        with_retries(failing(*[AWAY] * 1_000))
    assert not isinstance(raised.value, Exception)


def test_a_defect_is_not_waited_for(waits: Callable[[float], list[float]]) -> None:
    told = waits(10)
    with pytest.raises(redis.ResponseError):
        with_retries(failing(redis.ResponseError("WRONGTYPE x")))
    assert told == []


def test_the_parent_process_does_not_wait() -> None:
    with pytest.raises(redis.ConnectionError):
        with_retries(failing(AWAY))


def test_a_demoted_server_is_left_for_the_one_that_its_name_stands_for(waits: Callable[[float], list[float]]) -> None:
    waits(10)
    left: list[bool] = []
    with_retries(failing(redis.exceptions.ReadOnlyError("x"), AWAY), lambda: left.append(True))
    assert left == [True]


def test_a_thread_that_waits_lets_others_run(waits: Callable[[float], list[float]]) -> None:
    waits(10)
    is_back = threading.Event()

    def call() -> str:
        if not is_back.is_set():
            raise AWAY
        return "done"

    def work(job: Callable[[], Any]) -> Any:
        with gil.held():
            return job()

    with ThreadPoolExecutor(9) as threads:
        waiting = [threads.submit(work, lambda: with_retries(call)) for _ in range(8)]
        time.sleep(0.05)
        began = time.monotonic()
        threads.submit(work, lambda: None).result()
        assert time.monotonic() - began < gil.MAX_WAIT_S / 2
        is_back.set()
        assert [each.result() for each in waiting] == ["done"] * 8


# The client


@pytest.fixture
def client(broker: stack.Broker) -> Iterator[RetryingRedis]:
    made = RetryingRedis.from_url(broker.url, socket_timeout=5)
    with broker.connect() as server:
        server.flushall()
        yield made
        server.config_set("maxmemory", 0)
        server.config_set("min-replicas-to-write", 0)
    made.close()


def test_many_threads_share_few_connections(client: RetryingRedis, broker: stack.Broker) -> None:
    client.client_setname("ours")
    with broker.connect() as server, ThreadPoolExecutor(64) as threads:
        before = len(server.client_list())
        values = [threads.submit(client.incr, "n") for _ in range(2_000)]
        most = max(len(server.client_list()) for _ in range(20))
        assert sorted(each.result() for each in values) == list(range(1, 2_001))
    assert most - before < CONNECTIONS


@pytest.mark.parametrize("refusal", [("maxmemory", 1, 0), ("min-replicas-to-write", 1, 0)])
def test_commands_pipelines_and_scripts_wait_for_a_server_that_refuses(
    client: RetryingRedis, broker: stack.Broker, waits: Callable[[float], list[float]], refusal: tuple[str, int, int]
) -> None:
    told = waits(20)
    name, refuses, accepts = refusal
    script = client.register_script("return redis.call('SET', KEYS[1], ARGV[1])")
    pipe = client.pipeline()
    pipe.set("b", 1).expire("b", 60)
    calls: list[Callable[[], Any]] = [lambda: client.set("a", 1), pipe.execute, lambda: script(["c"], [1])]
    with broker.connect() as server, ThreadPoolExecutor(3) as threads:
        server.config_set(name, refuses)
        waiting = [threads.submit(call) for call in calls]
        time.sleep(0.3)
        assert not any(each.done() for each in waiting)
        server.config_set(name, accepts)
        assert [each.result(timeout=10) for each in waiting] == [True, [True, True], b"OK"]
        assert server.mget("a", "b", "c") == [b"1", b"1", b"1"]
    assert told


# What is published


@pytest.fixture
def app(broker: stack.Broker) -> Iterator[Celery]:
    made = Celery("publisher", broker=broker.url, amqp="worker.queue.publisher:AMQP", set_as_current=False)
    made.conf.broker_transport_options = {"max_retries": 0}
    made.conf.broker_pool_limit = 2
    made.conf.task_default_queue = "published"
    yield made
    made.close()


def test_a_message_waits_for_a_broker_that_refuses(
    app: Celery, broker: stack.Broker, client: RetryingRedis, waits: Callable[[float], list[float]]
) -> None:
    waits(20)
    with broker.connect() as server, ThreadPoolExecutor(8) as threads:
        server.config_set("min-replicas-to-write", 1)
        sent = [threads.submit(app.send_task, "a.link") for _ in range(8)]
        time.sleep(0.5)
        assert [each.result() for each in sent if each.done()] == []
        server.config_set("min-replicas-to-write", 0)
        for each in sent:
            each.result(timeout=10)
        assert server.llen("published") == 8


def test_a_message_that_waits_for_too_long_sends_its_job_back(
    app: Celery, broker: stack.Broker, client: RetryingRedis, waits: Callable[[float], list[float]]
) -> None:
    waits(0.2)
    with broker.connect() as server, ThreadPoolExecutor(8) as threads:
        server.config_set("maxmemory", 1)
        # The last ones wait for a producer.
        for each in [threads.submit(app.send_task, "a.link") for _ in range(8)]:
            with pytest.raises(RedisAway):
                each.result(timeout=10)


def test_a_message_waits_for_a_broker_that_is_away(app: Celery, waits: Callable[[float], list[float]]) -> None:
    waits(20)
    port = stack.free_port()
    app.conf.broker_url = f"redis://127.0.0.1:{port}/0"
    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(app.send_task, "a.link")
        time.sleep(0.5)
        assert not sent.done()
        with stack.broker(port=port) as server, server.connect() as redis_client:
            sent.result(timeout=10)
            assert redis_client.llen("published") == 1
