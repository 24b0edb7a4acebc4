"""Everything that goes wrong is one of our errors, and in time."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from celery import Celery, states
from kombu.exceptions import OperationalError

from tasks import (
    BrokerRefused,
    BrokerUnavailable,
    Client,
    ConfigurationError,
    IdeficsError,
    NotFound,
    NotPermitted,
    apps,
    result_wait,
)
from tasks.testing import canned
from tests.unit.client.messages import JOB, end
from worker.demo import stack

NOWHERE = "redis://127.0.0.1:1/0"


def of_urls(broker: str, results: str) -> Client:
    return Client(broker, result_backend=results, max_queued=None, max_memory=None)


def of_an_app(broker: str, results: str) -> Client:
    app = Celery("backend", broker=broker, backend=results, set_as_current=False)
    return Client(app=app, max_queued=None, max_memory=None)


both_ways = pytest.mark.parametrize("make", [of_urls, of_an_app])


@both_ways
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.ping(),
        lambda client: client.submit(JOB),
        lambda client: client.submit(JOB.model_copy(update={"idempotency_key": "k"})),
        lambda client: client.submit_many([JOB]),
        lambda client: client.queued(),
        lambda client: client.outcomes(["a"]),
        lambda client: client.forget(["a"]),
        lambda client: list(client.failed()),
        lambda client: client.retry("a"),
        lambda client: client.cancel("a"),
        lambda client: client.status("a"),
        lambda client: client.result("a"),
        lambda client: asyncio.run(client.aresult("a")),
        lambda client: asyncio.run(client.astatus("a")),
        lambda client: asyncio.run(client.acancel("a")),
        lambda client: asyncio.run(client.aoutcomes(["a"])),
        lambda client: asyncio.run(client.aforget(["a"])),
        lambda client: asyncio.run(client.aqueued()),
        lambda client: asyncio.run(client.aping()),
        lambda client: asyncio.run(client.afailed()),
        lambda client: asyncio.run(client.aretry("a")),
    ],
)
def test_a_broker_that_is_away_is_one_of_our_errors(make: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_wait, "AWAY_S", 0.0)
    monkeypatch.setitem(apps.RETRIES, "max_retries", 0)
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable) as away:
        call(make(NOWHERE, NOWHERE))
    assert time.monotonic() - began < 3
    assert (away.value.code, away.value.retryable, away.value.http_status) == ("broker_unavailable", True, 503)
    assert isinstance(away.value, ConnectionError)
    assert isinstance(away.value, OperationalError)
    assert isinstance(away.value, redis.ConnectionError)


@both_ways
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.submit(JOB),
        lambda client: client.submit_many([JOB]),
        lambda client: client.cancel("a"),
        lambda client: client.queued(),
        lambda client: client.result("a", 1),
    ],
)
def test_a_redis_that_dies_is_given_up_in_time(make: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(apps.RETRIES, "max_retries", 1)
    with stack.broker() as server:
        client = make(server.url, server.results)
        # Connections that break then, which kombu would try to mend without an end.
        client.submit(JOB)
        client.cancel("b")
        server.process.kill()
        server.process.wait()
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            call(client)
        assert time.monotonic() - began < 10


@both_ways
def test_a_job_is_queued_although_the_results_redis_is_away(broker: stack.Broker, make: Any) -> None:
    began = time.monotonic()
    assert make(broker.url, NOWHERE).submit(JOB, queue=uuid.uuid4().hex).id
    assert time.monotonic() - began < 10


def test_a_silent_server_is_not_asked_again(broker: stack.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "SOCKET_TIMEOUT_S", 1.5)
    client = of_an_app(broker.url, broker.results)
    client.submit(JOB, queue="never")
    with broker.connect() as server:
        server.execute_command("CLIENT", "PAUSE", 6_000, "WRITE")
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            client.submit(JOB, queue="never")
        assert time.monotonic() - began < 2 * 1.5
        server.execute_command("CLIENT", "UNPAUSE")


def test_a_wait_that_fails_because_redis_is_away_is_no_timeout() -> None:
    with pytest.raises(BrokerUnavailable):
        of_urls(NOWHERE, NOWHERE).result("a", timeout=0.1)


def test_every_call_gives_a_redis_that_is_away_up_in_seconds() -> None:
    began = time.monotonic()
    for call in (Client.ping, lambda client: client.submit(JOB), lambda client: client.cancel("a")):
        with pytest.raises(BrokerUnavailable):
            call(of_an_app(NOWHERE, NOWHERE))
    assert 3 < time.monotonic() - began < 12


def test_threads_share_one_check_of_a_broker_that_is_away() -> None:
    client = Client(NOWHERE)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(client.submit, JOB) for _ in range(4)]
    assert {type(end.exception()) for end in ends} == {BrokerUnavailable}
    assert time.monotonic() - began < 4


def test_an_app_of_yours_keeps_its_settings_and_its_connections() -> None:
    app = Celery("backend", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    app.conf.broker_transport_options = {"socket_timeout": 99, "visibility_timeout": 7}
    before = dict(app.conf)
    client = Client(app=app)
    # It may be configured until it is needed.
    app.conf.task_compression = "gzip"
    own = client._app.conf
    assert own.broker_transport_options["socket_timeout"] == 99
    assert own.broker_transport_options["socket_connect_timeout"] == apps.CONNECT_TIMEOUT_S
    assert own.broker_transport_options["visibility_timeout"] == 7
    assert (own.broker_url, own.result_backend, own.task_compression) == (NOWHERE, NOWHERE, "gzip")
    assert own.redis_socket_timeout == apps.SOCKET_TIMEOUT_S
    assert {**before, "task_compression": "gzip"} == dict(app.conf)


def test_what_redis_refuses_is_one_of_our_errors(broker: stack.Broker) -> None:
    with broker.connect() as server:
        server.execute_command("ACL", "SETUSER", "nobody", "on", ">pw", "~*", "&*", "+@all", "-mget", "-zrange")
    client = Client(broker.url.replace("//", "//nobody:pw@"))
    with pytest.raises(NotPermitted) as refused:
        client.outcomes(["a"])
    assert isinstance(refused.value, redis.exceptions.NoPermissionError)
    with pytest.raises(BrokerRefused):
        list(client.failed())


def test_a_job_that_is_no_failed_one_is_not_found(broker: stack.Broker) -> None:
    with pytest.raises(NotFound) as unknown:
        Client(broker.url).retry("a")
    assert isinstance(unknown.value, LookupError)


@pytest.mark.parametrize("url", ["memory://", "redis://a/x", "redis://host/0?db=1", "rediss://[/0"])
def test_a_url_that_cannot_be_used_is_one_of_our_errors(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Client(url)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("localhost:7102", "Write redis://localhost:7102/0."),
        ("localhost", "Write redis://localhost/0."),
        ("redis.example.com:6379/3", "Write redis://redis.example.com:6379/3."),
        ("http://localhost:7101/0", "http:// is not a Redis URL: write redis://host:6379/0."),
        ("https://user:pw@host", "https:// is not a Redis URL: write redis://host:6379/0."),
    ],
)
def test_a_url_that_is_meant_as_redis_is_told_how_it_is_written(url: str, cure: str) -> None:
    for urls in ({"broker_url": url}, {"broker_url": "redis://host/0", "result_backend": url}):
        with pytest.raises(ConfigurationError) as refused:
            Client(**urls)
        assert str(refused.value) == cure
    assert Client("memory://", result_backend="cache+memory://")
    assert Client("memory://", result_backend="rpc")


def test_an_app_without_results_says_so() -> None:
    client = Client(app=Celery("backend", broker="memory://", set_as_current=False), queue=uuid.uuid4().hex)
    job = client.submit(JOB)
    for call in (lambda: job.status, lambda: job.result(1), lambda: client.outcomes([job.id]), client.failed):
        with pytest.raises(ConfigurationError, match="result"):
            call()


def test_another_tasks_result_is_an_error_of_ours(client: Client, id: str) -> None:
    end(client, id, "a text", states.SUCCESS)
    with pytest.raises(IdeficsError, match="check the id") as foreign:
        client.result(id, timeout=1)
    assert foreign.value.detail == "foreign_result"


def test_asyncio_has_the_rest_too(client: Client) -> None:
    async def story() -> None:
        job = await client.asubmit(JOB)
        assert await job.astatus() == await client.astatus(job.id) == "starting"
        end(client, job.id, canned("an answer", JOB).model_dump(mode="json"), states.SUCCESS)
        assert (await client.aoutcomes(iter([job.id])))[job.id] == await job.aresult()
        await client.aforget(iter([job.id]))
        assert await client.astatus(job.id) == "starting"
        await job.acancel()
        await client.acancel(job.id)
        await client.aping()
        assert await client.aqueued() == 1

    asyncio.run(story())
