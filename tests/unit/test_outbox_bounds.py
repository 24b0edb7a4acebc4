"""Pending callbacks are bounded in bytes; steps of the outbox are whole; hosts that hang hold up none that answers."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import redis
from celery import Celery
from click.testing import CliRunner

from config.settings import Settings
from tasks import outbox as outboxes
from tasks.cli import main
from tasks.outbox import BYTES, HOSTS, SIZES, Delivery, Outbox, OutboxBounds, Shares, size_of
from tasks.redis_keys import DELIVERY, DELIVERY_AGES, OLDEST_DELIVERIES
from tests.support.outbox import KEEP_S, OK, Answers, counted, delivery, dispatching
from tests.support.receiver import SECRET
from worker.delivery import known_hosts
from worker.delivery.batching import admit
from worker.delivery.known_hosts import KnownHosts
from worker.delivery.recorder import LOG_INTERVAL_S, CallbackRecorder, GivenUpLog
from worker.delivery.retry import AttemptResult
from worker.demo import stack

ONE = size_of(delivery(1))


@pytest.fixture
def client(broker: stack.Broker) -> Iterator[Any]:
    with broker.connect(7) as client:
        client.flushdb()
        yield client
        client.flushdb()


def bounded(client: Any, *, host: int = 1_000, total: int = 1_000) -> Outbox:
    """One for so many deliveries of the tests'."""
    return Outbox(client, OutboxBounds(host * ONE + ONE // 2, total * ONE + ONE // 2, KEEP_S))


def jobs(outbox: Outbox, state: str) -> list[str]:
    return sorted(found.job for found in outbox.listed(state, 1_000))


def is_counted_right(client: Any, outbox: Outbox) -> bool:
    """The bytes are those that are counted anew."""
    before = client.hgetall(BYTES), client.hgetall(SIZES)
    outbox.recount()
    after = client.hgetall(BYTES), client.hgetall(SIZES)
    without_nothing = [{name: size for name, size in each.items() if size != b"0"} for each in (before[0], after[0])]
    return without_nothing[0] == without_nothing[1] and before[1] == after[1]


# Bounds


def test_beyond_one_hosts_bytes_its_oldest_deliveries_are_given_up(client: Any) -> None:
    told: list[tuple[str, int]] = []
    outbox = Outbox(client, OutboxBounds(3 * ONE + 10, 2**28, KEEP_S), lambda *found: told.append(found))
    outbox.add(delivery(9, url="https://other.test/hook"))
    for number in range(5):
        assert outbox.add(delivery(number))
    assert jobs(outbox, "pending") == ["job-2", "job-3", "job-4", "job-9"]
    assert jobs(outbox, "failed") == ["job-0", "job-1"]
    assert outbox.counts() == {"pending": 4, "failed": 2, "delivered": 0, "given_up": 2}
    assert told == [("shop.test", 1)] * 2
    assert "IDEFICS_CALLBACK_MAX_PENDING_BYTES" in outbox.listed("failed", 1)[0].note
    assert outbox.bytes() == {"shop.test": 3 * ONE, "other.test": ONE + 1}
    assert is_counted_right(client, outbox)


def test_beyond_the_bytes_of_all_hosts_the_oldest_deliveries_are_given_up(client: Any) -> None:
    outbox = bounded(client, total=4)
    for number in range(7):
        outbox.add(delivery(number, url=f"https://{number}.test/hoo"))
    assert jobs(outbox, "pending") == ["job-3", "job-4", "job-5", "job-6"]
    assert jobs(outbox, "failed") == ["job-0", "job-1", "job-2"]
    assert client.zcard(HOSTS) == len(outbox.bytes()) == 4
    assert is_counted_right(client, outbox)


def test_the_oldest_delivery_is_the_first_added_not_the_first_due(client: Any) -> None:
    outbox = bounded(client, host=3)
    for number in range(3):
        outbox.add(delivery(number))
    for found in outbox.claim(2, 60):
        outbox.again(found, 3_600, "status 503")
    outbox.add(delivery(3))
    assert jobs(outbox, "failed") == ["job-0"]


def test_a_replayed_delivery_counts_as_the_newest(client: Any) -> None:
    outbox = bounded(client, host=2)
    for number in range(3):
        outbox.add(delivery(number))
    (given_up,) = outbox.listed("failed", 9)
    assert outbox.replay(given_up.id)
    outbox.add(delivery(3))
    assert jobs(outbox, "pending") == ["job-0", "job-3"]
    assert jobs(outbox, "failed") == ["job-1", "job-2"]
    assert is_counted_right(client, outbox)


def test_a_delivery_given_up_during_its_attempt_can_only_become_delivered(client: Any) -> None:
    outbox = bounded(client, host=2)
    for number in range(2):
        outbox.add(delivery(number))
    first, second = outbox.claim(2, 60)
    outbox.add(delivery(2))
    outbox.add(delivery(3))
    assert jobs(outbox, "failed") == ["job-0", "job-1"]
    assert outbox.end(first, "delivered", "status 204", KEEP_S)
    assert not outbox.again(second, 0, "status 503")
    assert (jobs(outbox, "delivered"), jobs(outbox, "failed")) == (["job-0"], ["job-1"])
    assert is_counted_right(client, outbox)


def test_the_bytes_are_right_after_any_steps(client: Any) -> None:
    choose = random.Random(7)
    outbox = bounded(client, host=12, total=30)
    known: list[Delivery] = []
    held: list[Delivery] = []
    for number in range(600):
        step = choose.randrange(8)
        if step < 3:
            known.append(delivery(number, url=f"https://{choose.randrange(5)}.test/", body="x" * choose.randrange(500)))
            outbox.add(known[-1])
        elif step == 3:
            held += outbox.claim(4, choose.choice((0, 60)))
        elif step == 4 and held:
            outbox.end(held.pop(), choose.choice(("delivered", "failed")), "", KEEP_S)
        elif step == 5 and held:
            outbox.again(held.pop(), choose.choice((0, 60)), "status 503")
        elif step == 6 and known:
            outbox.replay(choose.choice(known).id)
        elif step == 7 and held:
            first = held.pop()
            members = [first, *(one for one in held if (one.host, one.token) == (first.host, first.token))][:3]
            outbox.batch(replace(first, id=f"msg_batch{number}", body="x" * 99), members, 60, KEEP_S)
        if number % 20 == 0:
            assert is_counted_right(client, outbox), number
    outbox.trim(0)
    assert outbox.counts()["failed"] == outbox.counts()["delivered"] == 0
    assert is_counted_right(client, outbox)
    assert max(outbox.bytes().values()) <= 12 * ONE + ONE


def test_a_lost_count_is_found_again(client: Any) -> None:
    outbox = bounded(client)
    for number in range(4):
        outbox.add(delivery(number, url=f"https://{number % 2}.test/hook"))
    before = outbox.bytes()
    client.delete(BYTES, SIZES, OLDEST_DELIVERIES.named(), DELIVERY_AGES.named("0.test"))
    assert outbox.recount() == sum(before.values())
    assert outbox.bytes() == before
    client.hset(BYTES, "gone.test", 999)
    outbox.recount()
    assert outbox.bytes() == before


def test_a_delivery_with_an_expired_record_no_longer_counts(client: Any) -> None:
    outbox = bounded(client)
    outbox.add(delivery(1))
    client.delete(DELIVERY.named(delivery(1).id))
    assert outbox.claim(9, 60) == []
    assert outbox.bytes() == {}
    assert client.hgetall(SIZES) == {}


def test_ended_deliveries_are_bounded_in_bytes(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MAX_ENDED_BYTES", 2 * ONE)
    outbox = bounded(client)
    for number in range(5):
        outbox.add(delivery(number))
        outbox.end(outbox.claim(1, 60)[0], "failed", "", KEEP_S)
    outbox.trim(KEEP_S)
    assert jobs(outbox, "failed") == ["job-3", "job-4"]
    assert outbox.read([delivery(0).id]) == []
    assert is_counted_right(client, outbox)


def test_given_up_callbacks_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture, broker: stack.Broker) -> None:
    app = Celery(broker=broker.url.replace("/0", "/7"), backend=broker.url.replace("/0", "/8"), set_as_current=False)
    recorder = CallbackRecorder(app, Settings(callback_keys=f"main={SECRET}", callback_max_host_bytes=2**16))
    callback = {"url": "https://93.184.216.34/hook", "key_id": "main"}
    for number in range(60):
        arguments = {"callback": callback, "metadata": {"a": "x" * 9_000}}
        recorder.record(f"j{number}", "idefics.write", arguments, ("REVOKED", None), is_stored=False)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "IDEFICS_CALLBACK_MAX_HOST_BYTES" in caplog.text
    assert sum(Outbox(broker.connect(7)).bytes().values()) <= 2**16
    broker.connect(7).flushdb()


def test_the_next_log_line_counts_those_given_up_since_the_last(caplog: pytest.LogCaptureFixture) -> None:
    now = 5.0
    given_up = GivenUpLog(lambda: now)
    given_up.add("a", 1)
    given_up.add("b", 2)
    now += LOG_INTERVAL_S
    given_up.add("c", 3)
    assert [record.args[0] for record in caplog.records if record.args] == [1, 5]  # type: ignore[index]


def test_the_hosts_with_most_are_listed(client: Any, broker: stack.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cli.deliveries.outbox_of", lambda app: Outbox(client))
    outbox = bounded(client, host=2)
    outbox.add(delivery(9, url="https://a.test/hook"))
    for number in range(3):
        outbox.add(delivery(number))
    run = CliRunner().invoke(main, ["--broker", broker.url, "deliveries", "hosts"])
    assert run.stdout == f"shop.test\t{2 * ONE}\na.test\t{size_of(delivery(9, url='https://a.test/hook'))}\n"
    listed = CliRunner().invoke(main, ["--broker", broker.url, "deliveries", "ls"])
    assert listed.stderr == "delivered=0 failed=1 given_up=1 pending=3\n"


def test_the_bytes_that_are_counted_are_those_that_redis_needs(client: Any) -> None:
    outbox = Outbox(client)
    before = client.info("memory")["used_memory"]
    for number in range(2_000):
        outbox.add(delivery(number, body="x" * 900))
    needed = client.info("memory")["used_memory"] - before
    assert 0.7 < needed / sum(outbox.bytes().values()) < 1.3


# Whole steps


@pytest.mark.parametrize(
    "name", ["hosts", "pending:shop.test", "oldest", "ages:shop.test", "sizes", "bytes", "disabled"]
)
def test_a_key_of_another_type_loses_no_delivery_and_stops_none(client: Any, name: str) -> None:
    outbox = bounded(client)
    client.lpush(f"idefics:callbacks:{name}", "a message")
    assert outbox.add(delivery(1))
    assert not outbox.is_disabled(delivery(1).url)
    client.delete(f"idefics:callbacks:{name}")
    client.lpush(f"idefics:callbacks:{name}", "a message")
    assert outbox.add(delivery(2))
    assert "job-2" in [found.job for found in outbox.claim(9, 60)]
    assert outbox.listed("pending", 9)


@pytest.mark.parametrize("name", ["failed", "delivered", "disabled", "oldest", "sizes", "bytes", "ages:shop.test"])
def test_with_a_key_of_another_type_an_attempts_result_is_still_recorded(client: Any, name: str) -> None:
    outbox = bounded(client)
    for number in range(2):
        outbox.add(delivery(number))
    first, second = outbox.claim(2, 60)
    client.delete(f"idefics:callbacks:{name}")
    client.lpush(f"idefics:callbacks:{name}", "a message")
    assert outbox.end(first, "delivered", "status 204", KEEP_S)
    assert outbox.end(second, "failed", "status 500", KEEP_S)
    assert outbox.replay(second.id)
    assert outbox.counts() == {"pending": 1, "delivered": 1, "failed": 0}


def test_a_record_of_another_type_is_replaced(client: Any) -> None:
    outbox = bounded(client)
    client.lpush(DELIVERY.named(delivery(1).id), "a message")
    assert outbox.add(delivery(1))
    assert [found.job for found in outbox.claim(9, 60)] == ["job-1"]


@pytest.mark.parametrize("fault", ["full", "replica", "alone"])
def test_a_server_that_refuses_leaves_nothing_of_a_delivery(client: Any, broker: stack.Broker, fault: str) -> None:
    outbox = bounded(client, host=2)
    for number in range(3):
        outbox.add(delivery(number))
    before = {key: client.dump(key) for key in sorted(client.keys())}
    server = broker.connect()
    change = {"full": ("maxmemory", 1, 0), "alone": ("min-replicas-to-write", 1, 0)}
    if fault == "replica":
        server.replicaof("127.0.0.1", stack.free_port())
    else:
        server.config_set(*change[fault][:2])
    try:
        with pytest.raises(redis.RedisError):
            outbox.add(delivery(9))
    finally:
        if fault == "replica":
            server.replicaof("NO", "ONE")
        else:
            server.config_set(change[fault][0], change[fault][2])
    assert {key: client.dump(key) for key in sorted(client.keys())} == before
    assert outbox.add(delivery(9))


def test_a_full_server_lets_what_is_pending_go_out(client: Any, broker: stack.Broker) -> None:
    outbox = bounded(client)
    outbox.add(delivery(1))
    posted = Answers()
    server = broker.connect()
    server.config_set("maxmemory", 1)
    try:
        with dispatching(outbox, posted):
            counted(outbox, pending=0, delivered=1)
    finally:
        server.config_set("maxmemory", 0)


# Hosts that hang


def test_hosts_are_remembered_by_their_last_answers() -> None:
    hosts = KnownHosts(1.0, ["old.test"])
    hosts.note("quick.test", has_answered=True, seconds=0.1)
    hosts.note("slow.test", has_answered=True, seconds=0.9)
    hosts.note("hung.test", has_answered=False, seconds=1.0)
    hosts.note("closed.test", has_answered=False, seconds=0.01)
    found = hosts.shares(16, {})
    assert found == Shares(frozenset({"old.test", "quick.test"}), frozenset({"hung.test"}), 8, 4)
    hosts.note("quick.test", has_answered=False, seconds=1.0)
    hosts.note("hung.test", has_answered=True, seconds=0.1)
    found = hosts.shares(16, {})
    assert (found.answered, found.silent) == ({"old.test", "hung.test"}, set())
    hosts.note("quick.test", has_answered=False, seconds=1.0)
    assert hosts.shares(16, {}).silent == {"quick.test"}


def test_known_hosts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hosts, "MAX_HOSTS", 3)
    hosts = KnownHosts(1.0)
    for number in range(9):
        hosts.note(f"{number}.test", has_answered=True, seconds=0)
        hosts.note(f"hung{number}.test", has_answered=False, seconds=9)
    found = hosts.shares(16, {})
    assert found.answered == {"6.test", "7.test", "8.test"}
    assert found.silent == {"hung6.test", "hung7.test", "hung8.test"}


def test_threads_are_divided_between_hosts_that_answer_and_silent_ones() -> None:
    hosts = KnownHosts(1.0)
    hosts.note("hung.test", has_answered=False, seconds=1.0)
    assert hosts.shares(16, {}).others == 16
    hosts.note("quick.test", has_answered=True, seconds=0.1)
    busy = {"hung.test": 3, "new.test": 2, "quick.test": 4}
    found = hosts.shares(16, busy)
    assert (found.others, found.silent_calls) == (3, 1)
    assert [(hosts.shares(n, {}).others, hosts.shares(n, {}).silent_calls) for n in (1, 2, 3)] == [
        (1, 1),
        (1, 1),
        (1, 1),
    ]


def test_a_claim_keeps_to_the_shares(client: Any) -> None:
    outbox = bounded(client)
    for number, host in enumerate(("hung1", "hung2", "hung3", "new1", "new2", "new3", "quick", "quick")):
        outbox.add(delivery(number, url=f"https://{host}.test/"))
    silent = frozenset({"hung1.test", "hung2.test", "hung3.test"})
    shares = Shares(frozenset({"quick.test", "away.test"}), silent, others=4, silent_calls=2)
    found = [one.host.removesuffix(".test") for one in outbox.claim(9, 60, shares=shares)]
    assert found == ["new1", "new2", "new3", "hung1", "quick", "quick"]
    found = [one.host.removesuffix(".test") for one in outbox.claim(9, 60, shares=shares)]
    assert found == ["hung2", "hung3"]


def test_no_more_deliveries_are_admitted_than_the_shares_allow() -> None:
    due = [[delivery(number, url=f"https://{host}.test/")] for number, host in enumerate("hhnnqq")]
    shares = Shares(frozenset({"q.test"}), frozenset({"h.test"}), others=2, silent_calls=1)
    now, waiting = admit(due, {}, free=9, per_host=9, shares=shares)
    assert [group[0].job for group in now] == ["job-0", "job-2", "job-4", "job-5"]
    assert [found.job for found in waiting] == ["job-1", "job-3"]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_hundreds_of_hosts_that_hang_hold_up_none_that_answers(client: Any, is_restarted: bool) -> None:
    outbox = Outbox(client)
    sent_at: dict[str, float] = {}
    arrived_at: dict[str, float] = {}
    opened = threading.Event()

    def post(found: Delivery) -> AttemptResult:
        if found.host.startswith("hung"):
            opened.wait(1.0)
            return AttemptResult(note="did not answer within 1 s")
        arrived_at.setdefault(found.job, time.monotonic())
        return OK

    def send(number: int) -> None:
        found = delivery(number, url=f"https://good{number % 3}.test/")
        sent_at[found.job] = time.monotonic()
        outbox.add(found)

    def wait_for_all() -> None:
        end = time.monotonic() + 30
        while len(arrived_at) < len(sent_at) and time.monotonic() < end:
            time.sleep(0.02)
        assert len(arrived_at) == len(sent_at)

    with ExitStack() as running:
        running.enter_context(dispatching(outbox, post, callback_timeout_s=1.0))
        for number in range(3):
            send(number)
        wait_for_all()
        if is_restarted:
            running.close()
        for number in range(200):
            outbox.add(delivery(10_000 + number, url=f"https://hung{number}.test/"))
        if is_restarted:
            running.enter_context(dispatching(outbox, post, callback_timeout_s=1.0))
        time.sleep(0.5)
        for number in range(3, 33):
            send(number)
            time.sleep(0.1)
        wait_for_all()
        opened.set()
    assert max(arrived_at[job] - sent_at[job] for job in sent_at) < 2.0
