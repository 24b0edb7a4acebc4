"""Messages that wait in Redis for their time."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from kombu import Queue
from kombu.message import Message

from tasks.redis_keys import DUE_IDS
from tests.support.waiting import eventually
from tests.unit.transport.taker import STOCK, Start, Taker, _refused, bodies, held, send_at
from worker.queue import due
from worker.queue.due import ETA, DueJobs
from worker.queue.envelope import checked
from worker.queue.reserve import MAX_DELAYED


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


def test_a_due_message_is_not_delayed_by_any_number_of_later_ones(start: Start, server: redis.Redis) -> None:
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


def test_a_message_before_its_time_takes_no_place_and_survives_a_refusing_broker(
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


def test_kombus_own_transport_returns_due_messages_to_their_queue(start: Start, server: redis.Redis) -> None:
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
