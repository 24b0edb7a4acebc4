"""Messages are reserved in one step, in order, and acknowledged."""

from __future__ import annotations

import json
import time

import pytest
import redis

from tests.support.waiting import eventually
from tests.unit.transport.taker import STOCK, Start, bodies, held
from worker.queue.poller import POLL_S


def test_a_message_is_in_unacked_before_the_reply_is_read(start: Start, server: redis.Redis) -> None:
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


def test_messages_that_were_not_started_return_unchanged_and_are_read_next(start: Start, server: redis.Redis) -> None:
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


def test_queues_take_turns_with_round_robin(start: Start) -> None:
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


def test_no_more_messages_are_reserved_than_prefetched(start: Start, server: redis.Redis) -> None:
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
    assert 2 <= calls <= 0.5 / (POLL_S / 2) + 2
    taker.send("a")
    sent = time.monotonic()
    taker.take()
    assert time.monotonic() - sent < 5
