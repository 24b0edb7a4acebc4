"""Connections that drop, and servers that refuse."""

from __future__ import annotations

from queue import Empty

import pytest
import redis
from celery.exceptions import ImproperlyConfigured

from tests.support.waiting import eventually
from tests.unit.transport.taker import STOCK, Start, _refused, bodies, held
from worker.queue import transport


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


def test_messages_held_at_the_close_return_in_order(start: Start, server: redis.Redis) -> None:
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
