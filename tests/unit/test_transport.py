"""The atomic take over a real Redis server, channel by channel: what is where after each step and each fault."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.exceptions import ImproperlyConfigured
from kombu import Connection, Queue
from kombu import transport as kombu_transport
from kombu.message import Message

from worker import transport
from worker.demo import stack

OURS, STOCK = "worker.transport:Transport", "kombu.transport.redis:Transport"
#: Seconds for what a broker does at once.
SOON_S = 5.0


@pytest.fixture
def server(broker: stack.Broker) -> Iterator[redis.Redis]:
    """Empty, and as it was after the test."""
    with broker.connect() as server:
        server.flushall()
        yield server
        server.config_set("maxmemory", 0)
        server.execute_command("ACL", "SETUSER", "default", "+@all")
        transport._debts.clear()


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, str | None]]:
    """What was dropped, with its id."""
    refused: list[tuple[bytes, str | None]] = []
    monkeypatch.setattr(transport, "_on_refused", lambda raw, why: refused.append((raw, why.id)))
    return refused


class Taker:
    """A consumer over a connection of its own, and what it was given."""

    def __init__(self, url: str, kind: str, queues: tuple[str, ...], no_ack: bool, options: dict[str, Any]) -> None:
        options = {"priority_steps": list(range(10)), "queue_order_strategy": "priority", **options}
        self.connection = Connection(url, transport=kind, transport_options=options)
        self.channel = self.connection.channel()
        self.messages: list[Message] = []
        self.consumer = self.connection.Consumer(
            [Queue(name) for name in queues],
            channel=self.channel,
            on_message=self.messages.append,
            accept=["json"],
            no_ack=no_ack,
        )

    def send(self, body: str, queue: str = "jobs", priority: int = 5) -> None:
        self.connection.Producer(self.channel, serializer="json").publish(
            body, routing_key=queue, priority=priority, declare=[Queue(queue)]
        )

    def take(self, timeout: float = SOON_S) -> Message:
        """The next message. Raises TimeoutError where there is none."""
        seen = len(self.messages)
        end = time.monotonic() + timeout
        while len(self.messages) == seen:
            if time.monotonic() > end:
                raise TimeoutError
            try:
                self.connection.drain_events(timeout=0.05)
            except TimeoutError:
                continue
        return self.messages[-1]

    def ask(self) -> None:
        """Send a take and do not read its reply."""
        self.channel._rests_until = 0.0
        self.channel.connection.cycle.on_poll_start()
        assert self.channel._in_poll


Start = Callable[..., Taker]


@pytest.fixture
def start(broker: stack.Broker, server: redis.Redis) -> Iterator[Start]:
    started: list[Taker] = []

    def start(*queues: str, kind: str = OURS, no_ack: bool = False, user: str = "", **options: Any) -> Taker:
        url = broker.url.replace("//", f"//{user}@") if user else broker.url
        taker = Taker(url, kind, queues or ("jobs",), no_ack, options)
        started.append(taker)
        taker.consumer.consume()
        return taker

    yield start
    for taker in started:
        taker.connection.release()


def eventually(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def held(server: redis.Redis) -> tuple[int, int, int]:
    """Messages in the queue `jobs`, in `unacked`, and in its index."""
    lists = ["jobs", *(f"jobs\x06\x16{priority}" for priority in range(1, 10))]
    return sum(server.llen(name) for name in lists), server.hlen("unacked"), server.zcard("unacked_index")


def bodies(taker: Taker, number: int) -> list[str]:
    return [taker.take().decode() for _ in range(number)]


# The take


def test_a_message_is_recorded_before_anybody_has_read_the_reply(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    taker.ask()
    eventually(lambda: held(server) == (0, 1, 1))
    assert taker.messages == []


def test_a_message_that_is_acknowledged_is_gone(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    message = taker.take()
    assert message.decode() == "a"
    assert held(server) == (0, 1, 1)
    message.ack()
    assert held(server) == (0, 0, 0)


def test_a_message_that_is_rejected_comes_again_last_of_its_priority_and_as_redelivered(
    start: Start, server: redis.Redis
) -> None:
    taker = start()
    for body in "ab":
        taker.send(body, priority=3)
    taker.take().reject(requeue=True)
    assert server.llen("jobs\x06\x163") == 2
    assert taker.take().decode() == "b"
    again = taker.take()
    assert again.decode() == "a"
    assert again.delivery_info["redelivered"] is True


def test_the_record_is_what_stock_kombu_writes(start: Start, server: redis.Redis) -> None:
    ours = start()
    body = 'a "quoted" \\ ü 😀'
    ours.send(body, priority=2)
    tag = ours.take().delivery_tag
    message, exchange, routing_key = json.loads(server.hget("unacked", tag))
    assert message["properties"]["priority"] == 2
    assert (exchange, routing_key) == ("", "jobs")
    stock = start(kind=STOCK)
    stock.channel.qos.restore_by_tag(tag)
    assert stock.take().decode() == body


def test_a_consumer_that_wants_none_leaves_messages_to_others(start: Start) -> None:
    full, free = start(), start()
    full.channel.wants = lambda: False
    full.send("a")
    with pytest.raises(TimeoutError):
        full.take(timeout=0.2)
    assert free.take().decode() == "a"
    full.channel.wants = lambda: True
    full.send("b")
    assert full.take().decode() == "b"


def test_a_consumer_that_wants_none_still_pays_its_debts(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    tag = taker.take().delivery_tag
    taker.channel.wants = lambda: False
    taker.channel.debts.ack(tag)
    with pytest.raises(TimeoutError):
        taker.take(timeout=0.2)
    assert held(server) == (0, 0, 0)


def test_priorities_are_kept(start: Start) -> None:
    taker = start()
    for priority in (9, 5, 0, 7, 5):
        taker.send(str(priority), priority=priority)
    assert bodies(taker, 5) == ["0", "5", "5", "7", "9"]


def test_several_queues_are_read_in_order_and_priorities_before_queues(start: Start) -> None:
    taker = start("first", "second")
    taker.send("second, 5", "second")
    taker.send("first, 5", "first")
    taker.send("second, 0", "second", priority=0)
    assert bodies(taker, 3) == ["second, 0", "first, 5", "second, 5"]


def test_queues_take_turns_where_they_shall(start: Start) -> None:
    taker = start("first", "second", queue_order_strategy="round_robin")
    for queue in ("first", "first", "second"):
        taker.send(queue, queue)
    assert bodies(taker, 3) == ["first", "second", "first"]


def test_a_queue_without_acknowledgements_is_not_recorded(start: Start, server: redis.Redis) -> None:
    taker = start(no_ack=True)
    taker.send("a")
    assert taker.take().decode() == "a"
    assert held(server) == (0, 0, 0)


def test_no_more_is_taken_than_prefetched(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.channel.basic_qos(0, 2, False)
    for body in "abc":
        taker.send(body)
    bodies(taker, 2)
    with pytest.raises(TimeoutError):
        taker.take(timeout=0.2)
    assert held(server) == (1, 2, 2)
    taker.messages[0].ack()
    assert taker.take().decode() == "c"


def test_a_flushed_script_is_sent_again(start: Start, server: redis.Redis) -> None:
    taker = start()
    server.script_flush()
    taker.send("a")
    assert taker.take().decode() == "a"
    server.script_flush()
    taker.send("b")
    assert taker.take().decode() == "b"
    assert held(server) == (0, 2, 2)


def test_every_key_has_the_global_prefix(start: Start, server: redis.Redis) -> None:
    taker = start(global_keyprefix="mine:")
    taker.send("a")
    message = taker.take()
    assert server.hlen("mine:unacked") == server.zcard("mine:unacked_index") == 1
    assert all(key.startswith(b"mine:") for key in server.scan_iter())
    message.reject(requeue=True)
    taker.take().ack()
    assert server.hlen("mine:unacked") == server.zcard("mine:unacked_index") == 0


def test_polling_is_bounded_and_prompt(start: Start, server: redis.Redis) -> None:
    taker = start()
    server.config_resetstat()
    with pytest.raises(TimeoutError):
        taker.take(timeout=0.5)
    calls = server.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert 5 <= calls <= 0.5 / (transport.POLL_S / 2) + 2
    taker.send("a")
    sent = time.monotonic()
    taker.take()
    assert time.monotonic() - sent < 0.5


# A message that cannot be recorded or read


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
def test_what_is_no_message_is_dropped_and_holds_nothing_up(
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


def test_a_defect_of_ours_gives_the_message_back_once_and_then_keeps_it(
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


def test_what_cannot_be_kept_stays_where_it_is(
    start: Start, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise redis.exceptions.ConnectionError

    monkeypatch.setattr(transport, "_on_refused", away)
    taker = start()
    server.lpush("jobs", b"{garbage")
    taker.send("a")
    assert taker.take().decode() == "a"
    assert held(server) == (0, 2, 2)


# Faults


def test_a_take_whose_connection_drops_is_given_back_by_the_next_one(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    taker.ask()
    eventually(lambda: held(server) == (0, 1, 1))
    server.client_kill_filter(_type="normal", skipme=True)
    taker.connection.collect()
    other = start()
    assert other.take().decode() == "a"
    assert held(server) == (0, 1, 1)


def test_a_take_in_flight_at_the_close_is_given_back(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    taker.ask()
    taker.connection.release()
    assert held(server) == (1, 0, 0)
    assert taker.messages == []


def test_what_is_held_at_the_close_goes_back_in_order(start: Start, server: redis.Redis) -> None:
    taker = start()
    for body in "abc":
        taker.send(body)
    bodies(taker, 3)
    taker.connection.release()
    assert held(server) == (3, 0, 0)
    assert bodies(start(), 3) == ["a", "b", "c"]


def test_a_late_reply_whose_message_has_gone_back_is_dropped(start: Start, server: redis.Redis) -> None:
    taker, other = start(), start()
    taker.send("a")
    taker.ask()
    eventually(lambda: held(server) == (0, 1, 1))
    (tag,) = server.hkeys("unacked")
    other.channel.qos.restore_by_tag(tag.decode())
    assert other.take().decode() == "a"
    taker.channel._brpop_sent_at -= transport.LATE_S
    with pytest.raises(Empty):
        taker.channel._brpop_read()
    assert taker.messages == []


def test_a_late_reply_whose_message_is_still_ours_is_delivered(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    taker.ask()
    eventually(lambda: held(server) == (0, 1, 1))
    taker.channel._brpop_sent_at -= transport.LATE_S
    assert taker.channel._brpop_read()
    assert taker.messages[0].decode() == "a"


def test_an_acknowledgement_that_was_refused_is_told_later(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    message = taker.take()
    server.execute_command("ACL", "SETUSER", "default", "-zrem")
    message.ack()
    assert held(server) == (0, 1, 1)
    server.execute_command("ACL", "SETUSER", "default", "+zrem")
    taker.send("b")
    assert taker.take().decode() == "b"
    assert held(server) == (0, 1, 1)


def test_an_acknowledgement_after_the_connection_is_told_by_the_next_one(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    message = taker.take()
    with _refused(server, "-hget"):
        # The broker does not take it back either.
        taker.connection.release()
    assert held(server) == (0, 1, 1)
    message.ack()
    other = start()
    with pytest.raises(TimeoutError):
        other.take(timeout=0.2)
    assert held(server) == (0, 0, 0)


def test_messages_that_could_not_be_given_back_are_given_back_by_the_next_connection(
    start: Start, server: redis.Redis
) -> None:
    taker = start()
    taker.send("a")
    taker.take()
    with _refused(server, "-hget"):
        taker.connection.release()
    assert held(server) == (0, 1, 1)
    assert start().take().decode() == "a"


@contextmanager
def _refused(server: redis.Redis, rule: str) -> Iterator[None]:
    server.execute_command("ACL", "SETUSER", "default", rule)
    yield
    server.execute_command("ACL", "SETUSER", "default", rule.replace("-", "+"))


def test_a_full_server_is_emptied(start: Start, server: redis.Redis) -> None:
    first = start()
    for body in "ab":
        first.send(body)
    server.config_set("maxmemory", 1)
    taker = start()
    for body in ("a", "b"):
        message = taker.take()
        assert message.decode() == body
        message.ack()
    assert held(server) == (0, 0, 0)


def test_a_publisher_waits_for_a_full_server(
    start: Start, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = start()
    taker.send("declares the queue")
    server.config_set("maxmemory", 1)
    # Not time.sleep itself, which other tests' threads call.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: server.config_set("maxmemory", 0))
    monkeypatch.setattr(transport, "time", clock)
    monkeypatch.setattr(transport, "get_event_loop", lambda: None)
    taker.send("a")
    assert held(server)[0] == 2


def test_an_event_loop_does_not_wait_for_a_full_server(
    start: Start, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = start()
    taker.send("declares the queue")
    server.config_set("maxmemory", 1)
    monkeypatch.setattr(transport, "get_event_loop", object)
    with pytest.raises(Exception, match="maxmemory"):
        taker.send("a")


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (redis.exceptions.OutOfMemoryError("command not allowed"), True),
        (redis.exceptions.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), True),
        (redis.exceptions.ResponseError("WRONGTYPE Operation against a key"), False),
        (redis.exceptions.NoPermissionError("no permissions"), False),
    ],
)
def test_only_a_full_server_or_disk_is_waited_for(error: Exception, ends: bool) -> None:
    assert transport.passes(error) is ends


def test_a_user_without_scripts_is_told_the_cure_at_the_start(start: Start, server: redis.Redis) -> None:
    server.execute_command("ACL", "SETUSER", "meek", "on", ">pw", "~*", "&*", "+@all", "-eval", "-evalsha")
    with pytest.raises(ImproperlyConfigured, match=r"\+eval \+evalsha.*IDEFICS_ATOMIC_TAKE=false"):
        start(user="meek:pw")
    assert start(user="meek:pw", kind=STOCK)


# The choice


def test_it_stands_for_redis_and_sentinel_urls_once_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu_transport, "TRANSPORT_ALIASES", dict(kombu_transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu_transport, "_transport_cache", {})
    transport.use()
    for url in ("redis://host/0", "rediss://host/0", "redis+socket:///run/redis.sock"):
        assert isinstance(Connection(url).transport, transport.Transport)
    assert isinstance(Connection("sentinel://host/0").transport, transport.SentinelTransport)
