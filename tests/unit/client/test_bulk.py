"""Jobs that are sent together."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery, signals
from kombu import Producer
from redis.client import Pipeline

from tasks import BrokerUnavailable, Client, Complete, InvalidRequest, QueueFull, apps, bulk
from tasks.protocol import SUBMITTED_AT
from tests.unit.client.messages import JOB, received
from worker.demo import stack


@pytest.fixture
def client(broker: stack.Broker) -> Iterator[Client]:
    client = Client(broker.url, queue=uuid.uuid4().hex)
    yield client
    client.app.close()


def job(number: int, **fields: Any) -> Complete:
    return Complete(prompt=[str(number)], **fields)


def send(client: Client, ids: Iterable[str], then: Callable[[], object] = lambda: None) -> list[int]:
    """Send jobs with these ids together; `then` is called before the block ends. Returns what `on_sent` was told."""
    sent: list[int] = []
    _send(client, ids, sent, then)
    return sent


def _send(client: Client, ids: Iterable[str], sent: list[int], then: Callable[[], object] = lambda: None) -> None:
    with client.bulk(sent.append) as many:
        for id in ids:
            many.submit(JOB, task_id=id)
        then()


def ids(client: Client) -> list[str]:
    return [message.headers["id"] for message in received(client)]


def fail(times: int, monkeypatch: pytest.MonkeyPatch, *, executes: bool) -> None:
    """The connection breaks so often while messages are sent: after the server has them, or before."""
    execute, left = Pipeline.execute, iter(range(times))

    def fails(pipe: Any, *args: Any, **options: Any) -> Any:
        sends = any(command[0][0] == "LPUSH" for command in pipe.command_stack)
        if not sends or next(left, None) is None:
            return execute(pipe, *args, **options)
        if executes:
            execute(pipe, *args, **options)
        raise redis.ConnectionError("broken")

    monkeypatch.setattr(Pipeline, "execute", fails)


def test_jobs_arrive_in_order_with_their_ids_and_options(client: Client) -> None:
    with client.bulk() as many:
        for number in range(250):
            many.submit(job(number), priority=3, task_id=f"row-{number}", headers={"row": number})
    messages = received(client)
    assert [message.headers["id"] for message in messages] == [f"row-{number}" for number in range(250)]
    assert [message.headers["row"] for message in messages] == list(range(250))
    assert [message.decode()[1]["prompt"] for message in messages] == [[{"text": str(n)}] for n in range(250)]
    assert {message.properties["priority"] for message in messages} == {3}


def test_with_an_older_kombu_they_are_sent_one_by_one(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Producer, "batch")
    assert send(client, ["one", "two"]) == [2]
    assert ids(client) == ["one", "two"]


def test_a_hundred_jobs_take_one_round_trip(client: Client, broker: stack.Broker) -> None:
    client.submit(JOB)
    with broker.connect() as server:
        before = server.info("stats")["total_reads_processed"]
        with client.bulk() as many:
            for number in range(100):
                many.submit(job(number))
        # Few: those that measure the queue, and our own.
        assert server.info("stats")["total_reads_processed"] - before < 50


def test_a_message_is_the_one_that_submit_would_send(client: Client, broker: stack.Broker) -> None:
    options: dict[str, Any] = {"task_id": "one", "expires": 60.0, "headers": {"a": 1}, "shadow": "b"}
    client.submit(JOB, **options)
    with client.bulk() as many:
        many.submit(JOB, **options)
    first, second = (json.loads(raw) for raw in broker.connect().lrange(f"{client.queue}\x06\x165", 0, -1))
    for message in (first, second):
        assert json.loads(base64.b64decode(message.pop("body")))[1] == JOB.arguments()
        assert message["headers"].pop("expires")
        del message["headers"][SUBMITTED_AT], message["properties"]["delivery_tag"]
        assert message["properties"].pop("expiration")
    assert first == second


def test_celerys_signals_are_sent_for_each_job(client: Client) -> None:
    seen: list[tuple[str, str]] = []

    def before(headers: dict[str, Any], **_: Any) -> None:
        seen.append(("before", headers["id"]))
        headers["trace"] = headers["id"]

    def after(headers: dict[str, Any], **_: Any) -> None:
        seen.append(("after", headers["id"]))

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        with client.bulk() as many:
            for id in ("a", "b"):
                many.submit(JOB, task_id=id)
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)
    assert seen == [("before", "a"), ("after", "a"), ("before", "b"), ("after", "b")]
    assert [message.headers["trace"] for message in received(client)] == ["a", "b"]


def test_task_sent_events_go_along(client: Client, broker: stack.Broker) -> None:
    client.app.conf.task_send_sent_event = True
    with broker.connect() as server, server.pubsub() as events:
        events.psubscribe("*celeryev/task.sent")
        assert events.get_message(timeout=5)
        with client.bulk() as many:
            many.submit(JOB, task_id="told")
        event = events.get_message(timeout=5)
    assert event is not None
    assert b"celeryev" in event["channel"]
    assert ids(client) == ["told"]


@pytest.mark.parametrize("executes", [True, False])
def test_a_connection_that_breaks_is_mended_and_all_are_sent_again_under_their_ids(
    client: Client, monkeypatch: pytest.MonkeyPatch, executes: bool
) -> None:
    fail(1, monkeypatch, executes=executes)
    assert send(client, "abc") == [3]
    assert ids(client) == list("abc") * (2 if executes else 1)


def test_jobs_count_as_sent_only_if_their_sending_did_not_fail(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "MAX_JOBS", 2)
    monkeypatch.setitem(apps.RETRIES, "max_retries", 0)
    sent: list[int] = []
    with pytest.raises(BrokerUnavailable, match="broken"):
        _send(client, "abc", sent, lambda: fail(1, monkeypatch, executes=False))
    assert sent == [2]
    assert ids(client) == ["a", "b"]


def test_a_queue_that_becomes_full_gets_the_jobs_before(client: Client) -> None:
    client = Client(app=client.app, queue=client.queue, max_queued=2)
    sent: list[int] = []
    with pytest.raises(QueueFull):
        _send(client, "abc", sent)
    assert sent == [2]
    assert ids(client) == ["a", "b"]


def test_a_job_that_is_refused_leaves_the_others_alone(client: Client) -> None:
    client = Client(app=client.app, queue=client.queue, max_job_bytes=1_000)
    with client.bulk() as many:
        many.submit(JOB, task_id="a")
        with pytest.raises(InvalidRequest):
            many.submit(Complete(prompt=["x" * 2_000]))
        many.submit(JOB, task_id="b")
    assert ids(client) == ["a", "b"]


def test_a_broker_that_is_full_refuses_without_telling_the_payload(client: Client, broker: stack.Broker) -> None:
    client = Client(app=client.app, queue=client.queue, max_memory=None)
    sent: list[int] = []
    with broker.connect() as server:
        with pytest.raises(QueueFull, match=r"full and refused") as full:
            _send(client, "a", sent, lambda: server.config_set("maxmemory", 1))
        server.config_set("maxmemory", 0)
    assert sent == []
    assert "LPUSH" not in str(full.value)


def test_a_job_with_an_idempotency_key_is_sent_at_once_and_in_order(client: Client) -> None:
    keyed, sent = job(1, idempotency_key=uuid.uuid4().hex), list[int]()
    with client.bulk(sent.append) as many:
        many.submit(job(0), task_id="a")
        many.submit(keyed, task_id="b")
        assert sent == [1, 1]
        many.submit(keyed, task_id="c")
        many.submit(job(2), task_id="d")
    assert sum(sent) == 4
    assert ids(client) == ["a", "b", "d"]


def test_large_jobs_are_not_collected(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "MAX_BYTES", 3_000)
    sent: list[int] = []
    with client.bulk(sent.append) as many:
        for _ in range(5):
            many.submit(Complete(prompt=["x" * 2_000]))
    assert sent == [2, 2, 1]


def test_a_broker_that_is_not_redis_gets_them_too(client: Client) -> None:
    client = Client("memory://", result_backend="cache+memory://", queue=uuid.uuid4().hex)
    assert send(client, "abc") == [3]
    assert ids(client) == ["a", "b", "c"]
    client.app.close()


@pytest.mark.parametrize("kind", ["an app of yours", "a prefix"])
def test_a_prefix_and_an_app_of_yours_are_kept_to(broker: stack.Broker, kind: str) -> None:
    app = Celery("backend", broker=broker.url, backend=broker.results, set_as_current=False)
    if kind == "a prefix":
        app.conf.broker_transport_options = {"global_keyprefix": "mine:", "queue_order_strategy": "priority"}
    client = Client(app=app, queue=uuid.uuid4().hex)
    send(client, "a")
    with client.app.connection_for_read() as connection:
        assert connection.default_channel.basic_get(client.queue) is not None
