"""Messages that cannot be recorded or read."""

from __future__ import annotations

import json

import pytest
import redis
from kombu.message import Message

from tests.unit.transport.taker import Start, held
from worker.queue import transport


def test_a_message_that_cannot_be_recorded_stays_in_its_queue(start: Start, server: redis.Redis) -> None:
    taker = start()
    server.set("unacked", "somebody else's")
    taker.send("a")
    with pytest.raises(TimeoutError):
        taker.take(timeout=0.2)
    assert server.llen("jobs\x06\x165") == 1
    server.delete("unacked")
    assert taker.take().decode() == "a"


GARBAGE = {
    "no JSON": b"garbage",
    "half an object": b"{garbage",
    "a list": b"[]",
    "properties that are a number": b'{"properties": 7}',
    "no text": b"\xff\xfe",
    "a body that is a number": b'{"body": 4611686018427387904, "headers": {"id": "a"}, "properties": {}}',
    "half a character": b'{"body": "\\ud800", "headers": {}, "properties": {}}',
    "headers nested too deep to read": b'{"body": "", "headers": {"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}}",
    "a number of thousands of digits": b'{"body": "", "headers": {"a": ' + b"9" * 5_000 + b"}}",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_dropped_and_delays_no_message(
    start: Start, server: redis.Redis, refused: list[tuple[bytes, str | None]], garbage: bytes
) -> None:
    taker = start()
    server.lpush("jobs", garbage)
    taker.send("a")
    assert taker.take().decode() == "a"
    assert held(server) == (0, 1, 1)
    assert refused == [(garbage, "a" if b'"id": "a"' in garbage else None)]


def test_a_typed_value_of_kombus_that_cannot_be_read_is_only_a_value(start: Start, server: redis.Redis) -> None:
    taker = start()
    bad = {"__type__": "decimal", "__value__": "abc"}
    plain = {"body": "e30=", "headers": {"a": bad}, "properties": {"body_encoding": "base64", "delivery_tag": "x"}}
    server.lpush("jobs", json.dumps(plain))
    message = taker.take()
    assert message.headers == {"a": bad}
    # It goes back as it came.
    message.reject(requeue=True)
    again = taker.take()
    assert again.headers == {"a": bad, "redelivered": True}
    assert held(server) == (0, 1, 1)


def test_a_message_came_from_the_queue_that_it_was_taken_from(start: Start, server: redis.Redis) -> None:
    taker = start()
    delivery = {"exchange": "x", "routing_key": "unacked_mutex", "consumer_tag": "c", "redelivered": True}
    plain = {"body": "e30=", "properties": {"body_encoding": "base64", "delivery_info": delivery}}
    server.lpush("jobs", json.dumps(plain))
    assert taker.take().delivery_info == {"exchange": "", "routing_key": "jobs", "redelivered": True}


RECORDS = {
    "no JSON": "[{garbage, '', 'jobs']",
    "a number": "7",
    "an object": "{}",
    "no headers": '[{"properties": {}}, "", "jobs"]',
    "no properties": '[{"headers": {}}, "", "jobs"]',
    "a queue that is a list": '[{"headers": {}, "properties": {}}, "", []]',
    "half a character": '[{"headers": {}, "properties": {}}, "", "\\ud800"]',
    "nested too deep to read": '[{"headers": {"a": ' + "[" * 5_000 + "]" * 5_000 + '}}, "", "jobs"]',
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_that_cannot_be_read_does_not_hold_the_others_up(
    start: Start, server: redis.Redis, refused: list[tuple[bytes, str | None]], record: str
) -> None:
    server.hset("unacked", "broken", record)
    server.zadd("unacked_index", {"broken": 2})
    taker = start(visibility_timeout=60)
    taker.send("a")
    tag = taker.take().delivery_tag
    server.zadd("unacked_index", {tag: 1})
    taker.channel.qos.restore_visible(num=10, interval=1)
    assert held(server) == (1, 0, 0)
    assert refused == [(record.encode(), None)]


def test_a_record_with_headers_or_a_priority_of_anothers_goes_back(start: Start, server: redis.Redis) -> None:
    odd = {"body": "", "headers": 7, "properties": {"priority": float("inf"), "delivery_info": None}}
    server.hset("unacked", "odd", json.dumps([odd, "", "jobs"]))
    server.zadd("unacked_index", {"odd": 2})
    start(visibility_timeout=60).channel.qos.restore_visible(num=10, interval=1)
    assert held(server) == (1, 0, 0)


def test_a_defect_returns_the_message_once_and_then_keeps_it(
    start: Start, server: redis.Redis, refused: list[tuple[bytes, str | None]]
) -> None:
    taker = start()

    def broken(message: Message) -> None:
        taker.messages.append(message)
        raise TypeError

    taker.consumer.on_message = broken
    taker.send("a")
    taker.take()
    assert refused == []
    taker.take()
    assert len(refused) == 1
    assert held(server) == (0, 0, 0)


def test_a_refused_message_stays_while_its_dead_letter_cannot_be_stored(
    start: Start, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise redis.exceptions.ConnectionError

    monkeypatch.setattr(transport.Transport, "on_refused", staticmethod(away))
    taker = start()
    server.lpush("jobs", b"{garbage")
    taker.send("a")
    assert taker.take().decode() == "a"
    assert held(server) == (0, 2, 2)
