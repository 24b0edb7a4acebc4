"""Messages whose holder is silent are delivered again."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu import Queue
from kombu.message import Message

from tests.unit.transport.taker import SOON_S, Start, Taker, bodies, held, send_at
from worker.queue import transport
from worker.queue.poller import SWEEP_S
from worker.queue.redeliveries import KEPT_S


def score(server: redis.Redis, tag: str) -> float:
    return float(server.zscore("unacked_index", tag) or 0)


def returns(server: redis.Redis, id: str, prefix: str = "") -> dict[bytes, bytes]:
    return server.hgetall(f"{prefix}idefics:redeliveries:{id}")


def test_no_script_and_no_sweep_takes_a_clients_time(
    start: Start, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = 86_400.0
    clock = SimpleNamespace(
        time=lambda: time.time() + day, monotonic=time.monotonic, sleep=time.sleep, localtime=time.localtime
    )
    monkeypatch.setattr(transport, "time", clock)
    monkeypatch.setattr(transport.stock, "time", clock.time)
    ahead, other = start(), start()
    for body in "ab":
        ahead.send(body)
    for taker in (ahead, other):
        tag = taker.take().delivery_tag
        assert abs(score(server, tag) - time.time()) < SOON_S
    ahead.channel.qos.extend()
    ahead.channel.qos.restore_visible(num=None, interval=1)
    assert held(server) == (0, 2, 2)
    assert abs(score(server, ahead.messages[0].delivery_tag) - time.time()) < SOON_S


def test_held_messages_are_extended_and_missing_ones_are_not(start: Start, server: redis.Redis) -> None:
    taker = start()
    for body in "abc":
        taker.send(body)
    bodies(taker, 3)
    kept, ended, gone = (message.delivery_tag for message in taker.messages)
    taker.messages[1].ack()
    server.zrem("unacked_index", gone)
    server.zadd("unacked_index", {kept: 1, "another's": 1})
    taker.channel.qos.extend()
    assert abs(score(server, kept) - time.time()) < SOON_S
    assert server.zscore("unacked_index", "another's") == 1
    assert server.zscore("unacked_index", gone) is None
    assert server.zscore("unacked_index", ended) is None


def test_a_full_server_hears_that_messages_are_held(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    tag = taker.take().delivery_tag
    server.zadd("unacked_index", {tag: 1})
    server.config_set("maxmemory", 1)
    taker.channel.qos.extend()
    assert abs(score(server, tag) - time.time()) < SOON_S


def test_a_consumer_that_is_asked_for_nothing_more_still_extends(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    tag = taker.take().delivery_tag
    taker.consumer.cancel()
    server.zadd("unacked_index", {tag: 1})
    taker.channel.connection.cycle.extend()
    assert abs(score(server, tag) - time.time()) < SOON_S


def test_a_process_that_was_frozen_lets_others_renew_before_it_sweeps(start: Start, server: redis.Redis) -> None:
    taker = start(visibility_timeout=60)
    cycle = taker.channel.connection.cycle
    server.hset("unacked", "silent", json.dumps([{"headers": {}, "properties": {}, "body": ""}, "", "jobs"]))
    server.zadd("unacked_index", {"silent": time.time() - 70})
    cycle._extended_at -= 31
    cycle.maybe_restore_messages()
    assert server.hexists("unacked", "silent")
    cycle._swept_at -= SWEEP_S
    cycle.maybe_restore_messages()
    assert not server.hexists("unacked", "silent")


def lose(server: redis.Redis, taker: Taker) -> Message:
    """Take a message whose holder then dies: it comes back through the sweep."""
    message = taker.take()
    server.zadd("unacked_index", {message.delivery_tag: 1})
    taker.channel.qos.restore_visible(num=None, interval=1)
    return message


@pytest.mark.parametrize("prefix", ["", "mine:"])
def test_a_swept_message_is_counted_until_its_job_ends(start: Start, server: redis.Redis, prefix: str) -> None:
    taker = start(visibility_timeout=60, global_keyprefix=prefix)
    send_at(taker, "a", 0, headers={"id": "a", "retries": 2})
    for _ in range(2):
        message = taker.take()
        server.zadd(f"{prefix}unacked_index", {message.delivery_tag: 1})
        taker.channel.qos.restore_visible(num=None, interval=1)
    assert returns(server, "a", prefix) == {b"2": b"2"}
    assert 60 < server.ttl(f"{prefix}idefics:redeliveries:a") <= 60 + KEPT_S
    taker.take().ack()
    assert returns(server, "a", prefix) == {}


def test_a_message_returned_in_order_is_not_counted(start: Start, server: redis.Redis) -> None:
    taker = start()
    send_at(taker, "a", 0, headers={"id": "a"})
    taker.take().reject(requeue=True)
    taker.take()
    taker.connection.release()
    assert start().take().decode() == "a"
    assert returns(server, "a") == {}


@pytest.mark.parametrize(
    "message",
    [
        {"headers": {"id": 7}, "properties": {}},
        {"headers": {"id": "\ud800"}, "properties": {}},
        {"headers": [], "properties": {}},
        {"headers": {"id": "a" * 5_000}, "properties": {"correlation_id": [1]}},
        {"headers": {"id": "a", "retries": "many"}, "properties": {}},
    ],
)
def test_a_returned_message_is_counted_where_it_has_an_id(
    start: Start, server: redis.Redis, message: dict[str, Any]
) -> None:
    taker = start(visibility_timeout=60)
    server.hset("unacked", "odd", json.dumps([{"body": "", **message}, "", "jobs"]))
    server.zadd("unacked_index", {"odd": 1})
    taker.channel.qos.restore_visible(num=None, interval=1)
    assert server.hlen("unacked") == 0


def test_a_first_protocol_message_is_counted_under_its_correlation_id(start: Start, server: redis.Redis) -> None:
    taker = start(visibility_timeout=60)
    taker.connection.Producer(taker.channel, serializer="json").publish(
        {"id": "a", "task": "t"}, routing_key="jobs", correlation_id="a", declare=[Queue("jobs")]
    )
    lose(server, taker)
    assert returns(server, "a") == {b"0": b"1"}
