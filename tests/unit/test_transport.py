"""The atomic reserve over a real Redis server, channel by channel: what is where after each step and each fault."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.exceptions import ImproperlyConfigured
from kombu import Connection, Queue
from kombu import transport as kombu_transport
from kombu.message import Message

from tasks.redis_keys import DUE_IDS
from tests.support.waiting import eventually
from worker.demo import stack
from worker.queue import due, transport
from worker.queue.due import ETA, DueJobs
from worker.queue.envelope import checked
from worker.queue.pending_acks import forget_pending_acks
from worker.queue.poller import POLL_S, SWEEP_S
from worker.queue.redeliveries import KEPT_S
from worker.queue.reserve import MAX_DELAYED

OURS, STOCK = "worker.queue.transport:Transport", "kombu.transport.redis:Transport"
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
        forget_pending_acks()


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, str | None]]:
    """What was dropped, with its id."""
    refused: list[tuple[bytes, str | None]] = []
    monkeypatch.setattr(transport.Transport, "on_refused", staticmethod(lambda raw, why: refused.append((raw, why.id))))
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
        self.channel.backoff.pause_until(0.0)
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


def test_messages_that_were_not_begun_go_back_as_they_came_and_are_read_next(start: Start, server: redis.Redis) -> None:
    taker = start()
    for body in ("a", "b", "c"):
        taker.send(body, priority=3)
    taker.send("later", priority=7)
    before = server.lrange("jobs\x06\x163", 0, -1)
    taken = [taker.take() for _ in range(3)]
    taker.send("d", priority=3)
    for message in reversed(taken):
        taker.channel.qos.hand_back(message)
    assert held(server) == (5, 0, 0)
    assert server.lrange("jobs\x06\x163", 1, -1) == before
    assert bodies(taker, 5) == ["a", "b", "c", "d", "later"]
    assert not any(message.delivery_info.get("redelivered") for message in taker.messages)


def test_a_message_is_handed_back_once(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    message = taker.take()
    taker.channel.qos.restore_by_tag(message.delivery_tag)
    taker.channel.qos.hand_back(message)
    assert held(server) == (1, 0, 0)


def test_a_message_that_cannot_be_handed_back_is_handed_back_by_the_next_connection(
    start: Start, server: redis.Redis
) -> None:
    taker = start()
    taker.send("a")
    message = taker.take()
    server.execute_command("ACL", "SETUSER", "default", "-eval")
    taker.channel.qos.hand_back(message)
    assert held(server) == (0, 1, 1)
    server.execute_command("ACL", "SETUSER", "default", "+eval")
    assert start().take().decode() == "a"


def test_a_full_server_takes_a_message_back(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a" * 1_000)
    message = taker.take()
    server.config_set("maxmemory", 1)
    taker.channel.qos.hand_back(message)
    assert held(server) == (1, 0, 0)


def test_a_record_of_another_form_is_handed_back_by_kombu(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    message = taker.take()
    raw, _, _ = json.loads(server.hget("unacked", message.delivery_tag))
    server.hset("unacked", message.delivery_tag, json.dumps([raw, "", "jobs"]) + " ")
    taker.channel.qos.hand_back(message)
    assert taker.take().decode() == "a"
    assert held(server) == (0, 1, 1)


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
    full.channel.can_accept = lambda: False
    full.send("a")
    with pytest.raises(TimeoutError):
        full.take(timeout=0.2)
    assert free.take().decode() == "a"
    full.channel.can_accept = lambda: True
    full.send("b")
    assert full.take().decode() == "b"


def test_a_consumer_that_wants_none_still_sends_its_pending_acks(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    tag = taker.take().delivery_tag
    taker.channel.can_accept = lambda: False
    taker.channel.pending_acks.ack(tag)
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


def test_a_monitors_channel_without_ack_emulation_delivers_and_puts_back_at_its_close(
    start: Start, server: redis.Redis
) -> None:
    taker = start(ack_emulation=False)
    taker.send("a")
    assert taker.take().decode() == "a"
    assert held(server) == (0, 0, 0)
    taker.connection.release()
    assert held(server) == (1, 0, 0)


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
    assert 5 <= calls <= 0.5 / (POLL_S / 2) + 2
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

    monkeypatch.setattr(transport.Transport, "on_refused", staticmethod(away))
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
    taker.channel._brpop_sent_at -= transport.STALE_REPLY_S
    with pytest.raises(Empty):
        taker.channel._brpop_read()
    assert taker.messages == []


def test_a_late_reply_whose_message_is_still_ours_is_delivered(start: Start, server: redis.Redis) -> None:
    taker = start()
    taker.send("a")
    taker.ask()
    eventually(lambda: held(server) == (0, 1, 1))
    taker.channel._brpop_sent_at -= transport.STALE_REPLY_S
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


def test_a_user_without_scripts_is_told_the_cure_at_the_start(start: Start, server: redis.Redis) -> None:
    server.execute_command("ACL", "SETUSER", "meek", "on", ">pw", "~*", "&*", "+@all", "-eval", "-evalsha")
    with pytest.raises(ImproperlyConfigured, match=r"\+eval \+evalsha.*IDEFICS_ATOMIC_RESERVE=false"):
        start(user="meek:pw")
    assert start(user="meek:pw", kind=STOCK)


# The choice


def test_what_is_owed_behind_sentinels_is_owed_whichever_of_them_is_asked() -> None:
    one, other = (Connection("sentinel://a:1/0;sentinel://b:2/0") for _ in range(2))
    other.switch("sentinel://b:2/0")
    assert transport.SentinelChannel.broker_identity(one) == transport.SentinelChannel.broker_identity(other)
    single = Connection("redis://a:1/0")
    assert transport.Channel.broker_identity(single) == single.as_uri()


def test_it_stands_for_redis_and_sentinel_urls_once_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu_transport, "TRANSPORT_ALIASES", dict(kombu_transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu_transport, "_transport_cache", {})
    transport.use()
    for url in ("redis://host/0", "rediss://host/0", "redis+socket:///run/redis.sock"):
        assert isinstance(Connection(url).transport, transport.Transport)
    assert isinstance(Connection("sentinel://host/0").transport, transport.SentinelTransport)


# Due times


def send_at(taker: Taker, body: str, at: float, **options: Any) -> None:
    """As Celery sends a job with a countdown."""
    eta = datetime.fromtimestamp(at, UTC).isoformat()
    taker.connection.Producer(taker.channel, serializer="json").publish(
        body, routing_key="jobs", declare=[Queue("jobs")], **{"headers": {"id": body, "eta": eta}, **options}
    )


def waiting(server: redis.Redis) -> int:
    """Messages that wait for their time."""
    return sum(server.zcard(name) for name in server.scan_iter("idefics:due:*"))


def test_a_message_before_its_time_waits_in_redis_byte_for_byte_and_comes_when_it_is_due(
    start: Start, server: redis.Redis
) -> None:
    taker, at = start(), time.time() + 0.5
    send_at(taker, "a", at)
    (raw,) = server.lrange("jobs", 0, -1)
    taker.ask()
    eventually(lambda: waiting(server) == 1)
    assert held(server) == (0, 0, 0)
    assert server.zrange("idefics:due:jobs", 0, -1) == [raw]
    assert taker.take().decode() == "a"
    assert 0 <= taker.channel.taken_at - at < 0.5
    assert (held(server), waiting(server)) == ((0, 1, 1), 0)


def test_due_messages_come_in_the_order_of_their_times_before_others_of_their_priority(
    start: Start, server: redis.Redis
) -> None:
    taker, now = start(), time.time()
    for body, delay in (("third", 0.3), ("first", 0.1), ("second", 0.2)):
        send_at(taker, body, now + delay, priority=5)
    send_at(taker, "last", now + 0.1, priority=6)
    taker.ask()
    eventually(lambda: waiting(server) == 4)
    time.sleep(0.4)
    taker.send("fourth", priority=5)
    taker.send("urgent", priority=0)
    assert bodies(taker, 6) == ["urgent", "first", "second", "third", "fourth", "last"]


def test_what_is_due_comes_at_once_behind_any_number_of_messages_before_their_time(
    start: Start, server: redis.Redis
) -> None:
    taker, number = start(), 10 * MAX_DELAYED
    for count in range(number):
        send_at(taker, str(count), time.time() + 3_600)
    send_at(taker, "now", time.time() - 1)
    server.config_resetstat()
    assert taker.take().decode() == "now"
    assert server.info("commandstats")["cmdstat_evalsha"]["calls"] <= number / MAX_DELAYED + 2
    assert (held(server), waiting(server)) == ((0, 1, 1), number)


@pytest.mark.parametrize(
    "eta",
    [
        "2026-11-29T14:15:35.743001+00:00",
        "2026-11-29T14:15:35+00:00",
        "2028-02-29T23:59:59.5+05:30",
        "2027-03-01T00:00:00-08:00",
        "2100-12-31T01:02:03.000009+14:00",
        "1970-01-01T00:00:00+00:00",
    ],
)
def test_the_script_reads_times_as_python_does(server: redis.Redis, eta: str) -> None:
    message = json.dumps({"body": "e30=", "headers": {"a": 1, "eta": eta, "b": '"eta": "x"'}})
    read = server.eval(f"{ETA} return string.format('%.6f', eta(ARGV[1]))", 0, message)
    assert float(read) == pytest.approx(datetime.fromisoformat(eta).timestamp(), abs=1e-5)


@pytest.mark.parametrize("eta", ["null", '"tomorrow"', '"2026-11-29"', "7", '"2026-11-29T14:15:35Z"'])
def test_the_script_leaves_other_forms_to_the_worker(server: redis.Redis, eta: str) -> None:
    assert server.eval(f"{ETA} return eta(ARGV[1])", 0, f'{{"body": "", "headers": {{"eta": {eta}}}}}') is None


def test_a_full_server_keeps_messages_before_their_time(start: Start, server: redis.Redis) -> None:
    taker = start()
    send_at(taker, "a", time.time() + 3_600)
    server.config_set("maxmemory", 1)
    taker.ask()
    eventually(lambda: waiting(server) == 1)
    assert held(server) == (0, 0, 0)


def test_a_message_whose_set_is_refused_stays_in_its_queue(start: Start, server: redis.Redis) -> None:
    taker = start()
    server.set("idefics:due:jobs", "somebody else's")
    send_at(taker, "a", time.time() + 3_600)
    with pytest.raises(TimeoutError):
        taker.take(timeout=0.2)
    assert held(server) == (1, 0, 0)


SOON = (datetime.now(UTC) + timedelta(days=20)).replace(microsecond=0, tzinfo=None).isoformat()
JOB = {"id": "a", "task": "t"}


def checked_message(taker: Taker) -> Message:
    """The next one, as the worker's consumer hands it on."""
    message = taker.take()
    message.headers = checked(message, 1_000_000).headers
    return message


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param({**JOB, "eta": SOON + "Z"}, [[], {}, {}], id="another offset"),
        pytest.param({**JOB, "eta": SOON}, [[], {}, {}], id="no offset"),
        pytest.param({}, {**JOB, "eta": SOON + "+00:00"}, id="Celery's first protocol"),
        pytest.param(JOB, {"args": [], "kwargs": {}, "eta": SOON + "+00:00"}, id="a mixture"),
    ],
)
def test_times_of_other_forms_wait_in_redis_too(
    start: Start, server: redis.Redis, headers: dict[str, Any], body: Any
) -> None:
    taker = start(global_keyprefix="mine:")
    taker.connection.Producer(taker.channel, serializer="json").publish(
        body, headers=headers, routing_key="jobs", declare=[Queue("jobs")]
    )
    (raw,) = server.lrange("mine:jobs", 0, -1)
    assert due.delay_until_due(checked_message(taker))
    assert server.zrange("mine:idefics:due:mine:jobs", 0, -1) == [raw]
    assert server.hlen("mine:unacked") == server.zcard("mine:unacked_index") == 0
    server.zadd("mine:idefics:due:mine:jobs", {raw: 1})
    again = checked_message(taker)
    # It came when it was due, by the server's clock.
    taker.channel.taken_at = 4e9
    assert not due.delay_until_due(again)
    assert "eta" not in again.headers
    again.ack()
    assert server.hlen("mine:unacked") == 0


@pytest.mark.parametrize("prefix", ["", "mine:"])
def test_a_job_is_taken_before_its_time_by_its_id_and_once(start: Start, server: redis.Redis, prefix: str) -> None:
    taker = start(global_keyprefix=prefix)
    for body in "abc":
        send_at(taker, body, time.time() + 3_600)
    taker.ask()
    eventually(lambda: server.zcard(f"{prefix}idefics:due-ids") == 3)
    known = {job.id: job for job in DueJobs(lambda: (server, prefix)).window()}
    assert sorted(known) == ["a", "b", "c"]
    with _refused(server, "-hset"):
        taker.channel.deliver_early(known["b"])
    assert (taker.messages, server.zcard(known["b"].key)) == ([], 3)
    for _ in range(2):
        taker.channel.deliver_early(known["b"])
    assert [message.decode() for message in taker.messages] == ["b"]
    taker.messages[0].ack()
    assert server.hlen(f"{prefix}unacked") == server.zcard(f"{prefix}unacked_index") == 0
    assert taker.consumer.purge() == 2
    assert not server.exists(known["a"].key, f"{prefix}idefics:due-ids")


def test_the_ids_of_many_jobs_before_their_time_are_read_window_by_window(
    server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(due, "WINDOW", 2)
    now = time.time()
    server.zadd(DUE_IDS.pattern, {f"{name}\nkey": now + at for at, name in enumerate("abcd")})
    server.zadd(DUE_IDS.pattern, {"stale\nkey": now - due.STALE_ID_S - 1})
    jobs = DueJobs(lambda: (server, ""))
    assert ["".join(job.id for job in jobs.window()) for _ in range(4)] == ["ab", "cd", "", "ab"]


def test_a_message_that_is_held_takes_no_place_and_survives_a_broker_that_refuses(
    start: Start, server: redis.Redis
) -> None:
    taker = start()
    taker.channel.basic_qos(0, 1, False)
    send_at(taker, "a", 0, headers={"id": "a", "eta": SOON + "Z"})
    message = taker.take()
    with _refused(server, "-hdel"):
        assert due.delay_until_due(message)
        assert (held(server), waiting(server)) == ((0, 1, 1), 0)
        taker.send("b", priority=0)
    assert taker.take().decode() == "b"
    eventually(lambda: waiting(server) == 1)
    assert held(server) == (0, 1, 1)


@pytest.mark.parametrize("reason", ["revoked", "expired"])
def test_a_job_that_has_ended_does_not_wait(start: Start, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    taker = start()
    if reason == "revoked":
        monkeypatch.setattr(due.worker_state, "revoked", {"a"})
    expires = {"expires": "2020-01-01T00:00:00+00:00"} if reason == "expired" else {}
    send_at(taker, "a", 0, headers={"id": "a", "eta": SOON + "Z", **expires})
    assert not due.delay_until_due(taker.take())


def test_a_worker_that_takes_as_stock_kombu_does_puts_them_back(start: Start, server: redis.Redis) -> None:
    taker = start()
    for number in range(due.RELEASED_AT_ONCE + 1):
        send_at(taker, str(number), time.time() + 3_600 + number)
    taker.ask()
    eventually(lambda: waiting(server) > 0)
    stock = start(kind=STOCK)
    assert not due.delay_until_due(Message(channel=stock.channel, headers={"id": "a", "eta": SOON}))
    due.release(stock.channel, ["jobs"])
    assert waiting(server) == 0
    assert held(server)[0] + server.hlen("unacked") == due.RELEASED_AT_ONCE + 1


# Messages for workers of other apps


@pytest.mark.parametrize(
    ("task", "priority", "list_"),
    [("site.save", 5, "jobs\x06\x163"), ("site.save", 2, "jobs"), ("idefics.chat", 5, "jobs\x06\x165")],
)
def test_a_task_of_another_app_is_put_and_put_back_where_a_stock_worker_reads(
    server: redis.Redis, start: Start, task: str, priority: int, list_: str
) -> None:
    taker = start()
    producer = taker.connection.Producer(taker.channel, serializer="json")
    taker.consumer.cancel()
    producer.publish([], routing_key="jobs", priority=priority, headers={"task": task}, declare=[Queue("jobs")])
    assert server.llen(list_) == 1
    taker.consumer.consume()
    message = taker.take()
    assert server.llen(list_) == 0
    message.requeue()
    assert server.llen(list_) == 1


# Messages whose holder is silent


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


def test_what_is_held_is_extended_and_what_is_gone_is_not(start: Start, server: redis.Redis) -> None:
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


def test_a_process_that_stood_still_lets_others_say_first_that_they_live(start: Start, server: redis.Redis) -> None:
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
def test_what_the_sweep_brings_back_is_counted_and_forgotten_with_its_end(
    start: Start, server: redis.Redis, prefix: str
) -> None:
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


def test_what_is_given_back_in_order_is_not_counted(start: Start, server: redis.Redis) -> None:
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
def test_whatever_comes_back_is_counted_where_it_can_be(
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
