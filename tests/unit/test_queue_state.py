"""What waits in the queues, read from a real Redis: every list is counted, and the oldest job's age is found."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery

from tasks import Client, Complete
from tasks.apps import app_at
from tasks.protocol import CANCEL_TTL_S, SUBMITTED_AT
from tasks.queue_state import TAIL_BYTES, QueueReader, QueueState
from tasks.redis_keys import DUE, GUIDES_SEPARATOR, SEPARATOR, list_name
from tasks.worker_registry import ServedModel, models_key, workers_key
from tests.support.messages import raw_message
from worker.demo.stack import Broker

JOB = Complete(prompt=["Hello"])


def state(app: Celery) -> QueueState:
    return QueueReader(app).read("idefics")["idefics"]


def sent(ago_s: float, **headers: Any) -> bytes:
    """A message that was sent so many seconds ago."""
    return raw_message({SUBMITTED_AT: time.time() - ago_s, **headers})


# Counts


def test_every_priority_is_counted_in_each_lists_name_that_producers_use(server: Broker, app: Celery) -> None:
    redis = server.connect()
    for sep in (SEPARATOR, GUIDES_SEPARATOR):
        for priority in range(10):
            redis.lpush(list_name("idefics", priority, sep), *["job"] * (priority + 1))
    found = state(app)
    # The list of priority 0 has one name.
    assert found.by_priority == {0: 2, **{priority: 2 * (priority + 1) for priority in range(1, 10)}}
    assert found.waiting == sum(found.by_priority.values()) == 110


def test_jobs_that_wait_for_their_time_are_counted_apart(server: Broker, app: Celery) -> None:
    for priority in (0, 3):
        server.connect().zadd(DUE.named(list_name("idefics", priority, SEPARATOR)), {"a": 1, "b": 2})
    assert (state(app).waiting, state(app).due_later) == (0, 4)


def test_another_deployments_keys_are_not_counted(server: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    server.connect().lpush("idefics", "job")
    server.connect().lpush("ours.idefics", "job", "job")
    monkeypatch.setenv("IDEFICS_BROKER_KEY_PREFIX", "ours.")
    assert state(app_at(server.url, None)).waiting == 2


def test_the_queues_of_all_models_are_found_whether_their_workers_live_or_not(server: Broker, app: Celery) -> None:
    redis, now = server.connect(), time.time()
    models = {ServedModel("m/large", "idefics.large").written(): now, ServedModel("m/old", "idefics").written(): 1}
    redis.zadd(models_key(app), models)
    redis.zadd(workers_key(app, "idefics.large"), {"gpu0": now, "gone": now - 60})
    found = QueueReader(app).read("idefics", with_known=True)
    assert list(found) == ["idefics", "idefics.large"]
    assert (found["idefics.large"].workers, found["idefics.large"].models) == (["gpu0"], ["m/large"])
    assert (found["idefics"].workers, found["idefics"].models) == ([], [])
    assert list(QueueReader(app).read("idefics")) == ["idefics"]


# Ages


def test_the_oldest_of_all_priorities_is_told_by_the_time_in_its_message(server: Broker) -> None:
    client, redis = Client(server.url), server.connect()
    client.submit(JOB, priority=0)
    assert 0 <= (state(client.app).oldest_age_s or -1) < 5
    redis.lpush(list_name("idefics", 9, SEPARATOR), sent(100), sent(50))
    redis.lpush(list_name("idefics", 5, GUIDES_SEPARATOR), sent(70))
    assert 100 <= (state(client.app).oldest_age_s or 0) < 105


def test_a_message_without_a_time_ages_from_when_it_was_first_seen(server: Broker, app: Celery) -> None:
    redis, reader = server.connect(), QueueReader(app)

    def age() -> float | None:
        return reader.read("idefics")["idefics"].oldest_age_s

    redis.lpush("idefics", raw_message(properties={"delivery_tag": "first"}))
    redis.lpush("idefics", raw_message(properties={"delivery_tag": "second"}))
    assert age() is None
    time.sleep(0.05)
    assert (age() or 0) >= 0.05
    redis.rpop("idefics")
    assert age() is None
    redis.rpop("idefics")
    assert age() is None
    redis.lpush("idefics", raw_message(properties={"delivery_tag": "second"}))
    # It left the list, and is another message now.
    assert age() is None


@pytest.mark.parametrize("value", [0, -5, 1e300, "1796036574.1", None, [1], True], ids=str)
def test_a_time_that_cannot_be_is_no_age(server: Broker, app: Celery, value: Any) -> None:
    server.connect().lpush("idefics", raw_message({SUBMITTED_AT: value}))
    assert state(app).oldest_age_s is None


@pytest.mark.parametrize("ago_s", [2 * CANCEL_TTL_S, -2 * CANCEL_TTL_S])
def test_a_time_that_no_waiting_job_can_have_is_no_age(server: Broker, app: Celery, ago_s: int) -> None:
    server.connect().lpush("idefics", sent(ago_s))
    assert state(app).oldest_age_s is None


def test_a_clock_that_is_ahead_makes_no_negative_age(server: Broker, app: Celery) -> None:
    server.connect().lpush("idefics", sent(-60))
    assert state(app).oldest_age_s == 0


@pytest.mark.parametrize("raw", [b"", b"\xff\x00\n" * 5_000, b"{" * 20_000, b'"idefics_submitted_at": 1', b"null"])
def test_no_message_of_another_form_stops_the_reading(server: Broker, app: Celery, raw: bytes) -> None:
    server.connect().lpush("idefics", raw)
    assert (state(app).waiting, state(app).oldest_age_s) == (1, None)


def test_text_in_a_message_does_not_pass_for_its_time(server: Broker, app: Celery) -> None:
    forged = json.dumps({SUBMITTED_AT: time.time() - 1_000})
    server.connect().lpush("idefics", sent(10, shadow=forged, argsrepr=forged))
    assert 10 <= (state(app).oldest_age_s or 0) < 15


def test_of_a_huge_message_only_the_end_leaves_redis(server: Broker, app: Celery) -> None:
    server.connect().lpush("idefics", raw_message({SUBMITTED_AT: time.time() - 10}, b"x" * 20_000_000))
    reader, before = QueueReader(app), _bytes_sent(server)
    assert 10 <= (reader.read("idefics")["idefics"].oldest_age_s or 0) < 20
    assert _bytes_sent(server) - before < 10 * TAIL_BYTES


def _bytes_sent(server: Broker) -> int:
    return int(server.connect().info("stats")["total_net_output_bytes"])


@pytest.mark.parametrize("more", [[], ["+eval"]], ids=["no script", "not in a script"])
def test_a_user_who_may_not_read_messages_gets_the_time_since_the_list_had_some(
    server: Broker, more: list[str]
) -> None:
    admin, rights = server.connect(), ["+llen", "+select", "+ping", *more]
    admin.acl_setuser("counter", enabled=True, nopass=True, keys=["idefics*"], commands=rights)
    try:
        reader = QueueReader(app_at(replace(server, credentials="counter:x@").url, None))
        admin.lpush("idefics", sent(100))
        assert reader.read("idefics")["idefics"].oldest_age_s is None
        time.sleep(0.05)
        assert 0.05 <= (reader.read("idefics")["idefics"].oldest_age_s or 0) < 50
    finally:
        admin.acl_deluser("counter")


def test_jobs_by_the_thousand_cost_no_more_than_one(server: Broker, app: Celery) -> None:
    reader = QueueReader(app)
    reader.read("idefics")
    server.connect().lpush("idefics", sent(1))
    few = _commands(server, reader)
    server.connect().lpush("idefics", *[sent(1)] * 5_000)
    assert _commands(server, reader) == few < 200


def _commands(server: Broker, reader: QueueReader) -> int:
    before = server.connect().info("stats")["total_commands_processed"]
    reader.read("idefics")
    # The reading's own INFO and its connection count too: the same each time.
    return int(server.connect().info("stats")["total_commands_processed"]) - int(before)
