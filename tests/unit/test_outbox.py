"""The outbox in a real Redis, and the dispatcher that empties it: what is due when, and what a kill leaves."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from tasks import outbox as outboxes
from tasks.cli import main
from tasks.outbox import Outbox, OutboxBounds, batch_id, delivery_id
from tests.support.outbox import KEEP_S, Answers, counted, delivery, dispatching
from worker.delivery import callback_dispatcher
from worker.delivery.batching import admit, group_by_target
from worker.delivery.retry import AttemptResult
from worker.demo import stack

DOWN = AttemptResult(503, "status 503")
#: What bounds the pending ones.
COUNTED = ("bytes", "sizes", "oldest", "ages:shop.test")


@pytest.fixture
def outbox(broker: stack.Broker) -> Iterator[Outbox]:
    with broker.connect(7) as client:
        client.flushdb()
        yield Outbox(client)
        client.flushdb()


def claimed(outbox: Outbox, limit: int = 10) -> list[str]:
    return [found.job for found in outbox.claim(limit, 60)]


# The outbox


def test_a_job_that_ends_twice_is_recorded_once(outbox: Outbox) -> None:
    assert outbox.add(delivery())
    assert not outbox.add(delivery())
    assert claimed(outbox) == ["job-1"]


def test_a_job_that_was_delivered_is_not_recorded_again(outbox: Outbox) -> None:
    outbox.add(delivery())
    (found,) = outbox.claim(1, 60)
    outbox.end(found, "delivered", "status 204", KEEP_S)
    assert not outbox.add(delivery())
    assert claimed(outbox) == []


def test_a_delivery_is_removed_while_no_worker_has_claimed_it(outbox: Outbox) -> None:
    assert outbox.remove(delivery()) is None
    outbox.add(delivery())
    outbox.add(delivery(2))
    assert outbox.remove(delivery()) is True
    (found,) = outbox.claim(10, 60)
    assert outbox.remove(found) is False
    outbox.put_back(found)
    assert outbox.remove(found) is True
    assert (outbox.counts()["pending"], outbox.bytes()) == (0, {})


def test_two_outboxes_with_prefixes_share_nothing(outbox: Outbox, broker: stack.Broker) -> None:
    with broker.connect(7) as client:
        mine = Outbox(client, OutboxBounds(keep_s=60), prefix="mine:")
        for number in range(3):
            mine.add(delivery(number))
        assert (outbox.counts()["pending"], outbox.claim(10, 60)) == (0, [])
        first, second, third = mine.claim(10, 60)
        assert mine.again(first, 60, "status 503")
        assert mine.end(second, "failed", "status 503", KEEP_S)
        assert mine.replay(second.id)
        batch = replace(third, id=batch_id([third.id]), event="job.batch")
        assert mine.batch(batch, [third], 60, KEEP_S)
        mine.disable("https://shop.test/gone", 60)
        assert list(mine.disabled()) == ["https://shop.test/gone"]
        (again, *_) = mine.claim(10, 60)
        assert mine.end(again, "delivered", "status 204", KEEP_S)
        assert mine.recount() > 0
        mine.trim(KEEP_S)
        assert {key[:23] for key in client.scan_iter()} == {b"mine:idefics:callbacks:"}


def test_ids_tell_jobs_and_events_apart_and_are_the_same_each_time() -> None:
    ids = {delivery_id(job, event) for job in ("a", "b") for event in ("job.failed", "job.canceled")}
    assert len(ids) == 4
    assert all(re.fullmatch(r"msg_[0-9a-f]{32}", id) for id in ids)
    assert batch_id(["b", "a"]) == batch_id(["a", "b"])


def test_a_claimed_delivery_is_not_claimed_again(outbox: Outbox) -> None:
    for number in range(3):
        outbox.add(delivery(number))
    assert claimed(outbox, limit=2) == ["job-0", "job-1"]
    assert claimed(outbox) == ["job-2"]


def test_deliveries_of_a_killed_worker_are_due_when_its_lease_ends(outbox: Outbox) -> None:
    outbox.add(delivery())
    outbox.claim(1, lease_s=0.05)
    assert claimed(outbox) == []
    time.sleep(0.06)
    assert claimed(outbox) == ["job-1"]


def test_an_expired_lease_cannot_settle_a_delivery(outbox: Outbox) -> None:
    outbox.add(delivery())
    (late,) = outbox.claim(1, lease_s=0)
    (held,) = outbox.claim(1, 60)
    assert not outbox.end(late, "failed", "", KEEP_S)
    assert outbox.end(held, "delivered", "", KEEP_S)
    assert outbox.read([late.id])[0].state == "delivered"


def test_a_failed_attempt_is_due_when_its_time_comes(outbox: Outbox) -> None:
    outbox.add(delivery())
    outbox.again(outbox.claim(1, 60)[0], 0.05, "status 503")
    assert claimed(outbox) == []
    time.sleep(0.06)
    (found,) = outbox.claim(1, 60)
    assert (found.attempts, found.note) == (1, "status 503")


def test_a_delivery_that_was_put_back_counts_no_attempt(outbox: Outbox) -> None:
    outbox.add(delivery())
    outbox.put_back(outbox.claim(1, 60)[0])
    assert outbox.claim(1, 60)[0].attempts == 0


def test_a_replay_starts_with_the_first_attempt_under_the_same_id(outbox: Outbox) -> None:
    outbox.add(delivery())
    (found,) = outbox.claim(1, 60)
    outbox.disable(found.url, 60)
    outbox.end(found, "failed", "status 410", KEEP_S)
    assert outbox.replay(found.id)
    (again,) = outbox.claim(1, 60)
    assert (again.id, again.body, again.attempts) == (found.id, found.body, 0)
    assert not outbox.is_disabled(found.url)
    assert outbox.counts() == {"pending": 1, "delivered": 0, "failed": 0}
    assert not outbox.replay("msg_unknown")


def test_a_disabled_url_is_enabled_when_its_time_has_passed(outbox: Outbox) -> None:
    outbox.disable("https://shop.test/a", 60)
    outbox.disable("https://shop.test/b", 0.05)
    assert outbox.is_disabled("https://shop.test/b")
    time.sleep(0.06)
    assert not outbox.is_disabled("https://shop.test/b")
    assert list(outbox.disabled()) == ["https://shop.test/a"]


def test_disabled_urls_are_bounded(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MAX_DISABLED", 3)
    for number in range(5):
        outbox.disable(f"https://shop.test/{number}", 60 + number)
    assert list(outbox.disabled()) == [f"https://shop.test/{number}" for number in (2, 3, 4)]


def test_ended_deliveries_are_bounded_and_removed(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MAX_DELIVERED", 2)
    for number in range(4):
        outbox.add(delivery(number))
        outbox.end(outbox.claim(1, 60)[0], "delivered", "", KEEP_S)
    outbox.trim(KEEP_S)
    assert [found.job for found in outbox.listed("delivered", 10)] == ["job-3", "job-2"]
    assert outbox.read([delivery(0).id]) == []
    outbox.trim(0)
    assert outbox.listed("delivered", 10) == []


def test_every_key_expires(outbox: Outbox, broker: stack.Broker) -> None:
    for number in range(4):
        outbox.add(delivery(number))
    for found, end in zip(outbox.claim(3, 60), ("delivered", "failed", "again"), strict=True):
        if end == "again":
            outbox.again(found, 1, "")
        else:
            outbox.end(found, end, "", KEEP_S)  # type: ignore[arg-type]
    members = outbox.claim(1, 60)
    outbox.batch(replace(delivery(9), id="msg_batch", token=members[0].token), members, 60, KEEP_S)
    outbox.disable("https://shop.test/", 60)
    with broker.connect(7) as client:
        keys = {key.decode(): client.ttl(key) for key in client.scan_iter()}
        assert min(keys.values()) > 0
        assert set(keys) == {
            *(f"idefics:callbacks:delivery:{delivery(number).id}" for number in range(4)),
            "idefics:callbacks:delivery:msg_batch",
            *(
                f"idefics:callbacks:{name}"
                for name in ("hosts", "pending:shop.test", "delivered", "failed", "disabled", *COUNTED)
            ),
        }


def test_recorded_deliveries_can_be_settled_though_redis_is_full(outbox: Outbox, broker: stack.Broker) -> None:
    for number in range(3):
        outbox.add(delivery(number))
    with broker.connect() as server:
        server.config_set("maxmemory", 1)
        try:
            first, second, third = outbox.claim(9, 60)
            assert outbox.end(first, "delivered", "status 204", KEEP_S)
            assert outbox.again(second, 60, "status 503")
            assert outbox.put_back(third)
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                outbox.add(delivery(9))
        finally:
            server.config_set("maxmemory", 0)
    assert outbox.counts() == {"pending": 2, "delivered": 1, "failed": 0}


# Batches


def test_a_batch_replaces_its_members(outbox: Outbox) -> None:
    for number in range(3):
        outbox.add(delivery(number))
    members = outbox.claim(2, 60)
    batch = replace(delivery(9), id="msg_batch", event="job.batch", token=members[0].token)
    assert outbox.batch(batch, members, 60, KEEP_S)
    assert {found.id for found in outbox.listed("pending", 10)} == {"msg_batch", delivery(2).id}
    assert {found.batch for found in outbox.read(member.id for member in members)} == {"msg_batch"}
    assert outbox.end(batch, "failed", "", KEEP_S)
    assert outbox.replay(members[0].id)
    assert {found.id for found in outbox.listed("pending", 10)} == {"msg_batch", delivery(2).id}


def test_no_batch_is_made_of_deliveries_that_another_worker_claimed(outbox: Outbox) -> None:
    for number in range(2):
        outbox.add(delivery(number))
    members = outbox.claim(2, lease_s=0)
    outbox.claim(1, 60)
    assert not outbox.batch(replace(delivery(9), id="msg_batch", token=members[0].token), members, 60, KEEP_S)
    assert outbox.read(["msg_batch"]) == []


def test_only_first_attempts_at_the_same_url_with_the_same_key_are_grouped() -> None:
    due = [
        delivery(0),
        delivery(1, url="https://other.test/"),
        delivery(2, key_id="second"),
        delivery(3, attempts=1),
        delivery(4),
        delivery(5, event="job.batch"),
    ]
    assert [[found.job for found in group] for group in group_by_target(due, 10)] == [
        ["job-0", "job-4"],
        ["job-1"],
        ["job-2"],
        ["job-3"],
        ["job-5"],
    ]
    assert len(group_by_target(due, 1)) == 6


def test_a_batch_is_bounded_in_number_and_size() -> None:
    assert [len(group) for group in group_by_target([delivery(number) for number in range(5)], 2)] == [2, 2, 1]
    large = [delivery(number, body="x" * 9_000) for number in range(3)]
    assert [len(group) for group in group_by_target(large, 10)] == [2, 1]


# What is sent now


def test_deliveries_that_wait_for_a_busy_host_delay_no_others(outbox: Outbox) -> None:
    for number in range(50):
        outbox.add(delivery(number, url=f"https://Slow.test/{number}"))
    outbox.add(delivery(99, url="https://quick.test/"))
    found = outbox.claim(9, 60, per_host=3, busy={"slow.test": 1, "other.test": 3})
    assert [one.job for one in found] == ["job-0", "job-1", "job-99"]
    assert outbox.claim(9, 60, per_host=3, busy={"slow.test": 3}) == []
    assert claimed(outbox, limit=2) == ["job-2", "job-3"]


def test_the_host_that_waited_longest_is_served_first(outbox: Outbox) -> None:
    for number in range(3):
        outbox.add(delivery(number, url=f"https://{2 - number}.test/"))
    assert claimed(outbox, limit=1) == ["job-0"]
    outbox.add(delivery(9, url="https://2.test/"))
    assert [claimed(outbox, limit=1) for _ in range(4)] == [["job-1"], ["job-2"], ["job-9"], []]


def test_a_request_may_carry_several_deliveries(outbox: Outbox) -> None:
    for number in range(9):
        outbox.add(delivery(number))
    assert len(outbox.claim(5, 60, per_host=2, each=3)) == 6


def test_no_more_is_admitted_than_threads_and_hosts_allow() -> None:
    due = [delivery(number, url="https://slow.test/") for number in range(3)]
    due += [delivery(number, url=f"https://{number}.test/") for number in range(3, 6)]
    now, waiting = admit([[found] for found in due], {"slow.test": 1}, free=3, per_host=3)
    assert [group[0].job for group in now] == ["job-0", "job-1", "job-3"]
    assert [found.job for found in waiting] == ["job-2", "job-4", "job-5"]


# The dispatcher


def test_a_due_delivery_is_attempted_until_it_is_accepted(outbox: Outbox) -> None:
    post = Answers(DOWN)
    outbox.add(delivery())
    with dispatching(outbox, post):
        counted(outbox, pending=0, delivered=1)
    assert [found.attempts for found in post.posted] == [0, 1]
    assert len({(found.id, found.body) for found in post.posted}) == 1


def test_a_delivery_that_fails_each_attempt_is_listed_as_failed(outbox: Outbox) -> None:
    outbox.add(delivery())
    with dispatching(outbox, Answers(DOWN, DOWN, DOWN)):
        counted(outbox, pending=0, failed=1)
    (found,) = outbox.listed("failed", 10)
    assert (found.attempts, found.note) == (3, "status 503")


def test_410_disables_the_url(outbox: Outbox) -> None:
    post = Answers(AttemptResult(410, "status 410"))
    outbox.add(delivery(1))
    with dispatching(outbox, post):
        counted(outbox, failed=1)
        outbox.add(delivery(2))
        outbox.add(delivery(3, url="https://other.test/"))
        counted(outbox, failed=2, delivered=1)
    assert [found.job for found in post.posted] == ["job-1", "job-3"]


def test_a_defect_loses_no_delivery(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback_dispatcher, "LEASE_MARGIN_S", 0.1)
    outbox.add(delivery())
    post = Answers(RuntimeError("a defect"))
    with dispatching(outbox, post, callback_timeout_s=0.1):
        counted(outbox, delivered=1)
    assert len(post.posted) == 2


def test_a_defect_at_each_attempt_ends_a_delivery(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback_dispatcher, "LEASE_MARGIN_S", 0.1)
    outbox.add(delivery())
    post = Answers(*[RuntimeError("a defect")] * 9)
    with dispatching(outbox, post, callback_timeout_s=0.1, callback_schedule_s=(0, 0.05, 0.05)):
        counted(outbox, failed=1)
    assert len(post.posted) == 3


def test_deliveries_that_are_due_together_are_sent_as_batches(outbox: Outbox) -> None:
    post = Answers(DOWN)
    for number in range(5):
        outbox.add(delivery(number))
    with dispatching(outbox, post, callback_batch_window_s=0.1, callback_batch_max=3):
        counted(outbox, pending=0, delivered=2)
    first, second, again = sorted(post.posted, key=lambda found: found.attempts)
    assert {len(json.loads(found.body)["data"]["events"]) for found in (first, second)} == {3, 2}
    assert (again.id, again.body) in {(found.id, found.body) for found in (first, second)}


# The commands


@pytest.fixture
def listed(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """With one delivery of each kind; the commands read it."""
    monkeypatch.setattr("tasks.cli.deliveries.outbox_of", lambda app: outbox)
    for number, url in enumerate(["https://shop.test/s3cr3t?a=s3cr3t"] * 3):
        outbox.add(delivery(number, url))
    delivered, failed = outbox.claim(2, 60)
    outbox.end(delivered, "delivered", "status 204", KEEP_S)
    outbox.end(failed, "failed", "status 500", KEEP_S)
    return outbox


@pytest.fixture
def run(broker: stack.Broker) -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(main, ["--broker", broker.url, "deliveries", *arguments])


def test_deliveries_are_listed_without_their_urls_secrets(listed: Outbox, run: Callable[..., Any]) -> None:
    outcome = run("ls")
    rows = [line.split("\t") for line in outcome.stdout.splitlines()]
    assert [(row[1], row[2], row[4], row[5], row[6], row[7]) for row in rows] == [
        ("pending", "0", "job.succeeded", "job-2", "shop.test", "-"),
        ("failed", "1", "job.succeeded", "job-1", "shop.test", "status 500"),
        ("delivered", "1", "job.succeeded", "job-0", "shop.test", "status 204"),
    ]
    assert "s3cr3t" not in outcome.output
    assert outcome.stderr == "delivered=1 failed=1 pending=1\n"
    assert len(run("ls", "--state", "failed").stdout.splitlines()) == 1


def test_deliveries_are_listed_as_json_without_their_urls_secrets(listed: Outbox, run: Callable[..., Any]) -> None:
    outcome = run("ls", "--state", "failed", "--json")
    (found,) = map(json.loads, outcome.stdout.splitlines())
    assert {name: found[name] for name in ("state", "attempts", "job", "host", "note")} == {
        "state": "failed", "attempts": 1, "job": "job-1", "host": "shop.test", "note": "status 500",
    }  # fmt: skip
    assert "s3cr3t" not in outcome.output
    (host,) = map(json.loads, run("hosts", "--json").stdout.splitlines())
    assert host == {"host": "shop.test", "bytes": listed.bytes()["shop.test"]}


def test_replays_and_disabled_urls_are_reported_as_json(listed: Outbox, run: Callable[..., Any]) -> None:
    outcome = run("replay", delivery(1).id, "msg_unknown", "--json")
    assert (outcome.exit_code, outcome.stderr) == (1, "")
    assert list(map(json.loads, outcome.stdout.splitlines())) == [
        {"id": delivery(1).id, "sent": True},
        {"id": "msg_unknown", "sent": False},
    ]
    listed.disable("https://shop.test/gone", 60)
    (disabled,) = map(json.loads, run("disabled", "--json").stdout.splitlines())
    assert disabled["url"] == "https://shop.test/gone"
    assert abs(disabled["until"] - time.time() - 60) < 10


def test_failed_deliveries_are_replayed_together(listed: Outbox, run: Callable[..., Any]) -> None:
    assert run("replay", "--failed").stdout == "1 go out again.\n"
    assert listed.counts() == {"pending": 2, "delivered": 1, "failed": 0}


def test_named_deliveries_are_replayed_and_unknown_ones_reported(listed: Outbox, run: Callable[..., Any]) -> None:
    outcome = run("replay", delivery(0).id, "msg_unknown")
    assert outcome.exit_code == 1
    assert (outcome.stdout, outcome.stderr) == ("1 go out again.\n", "msg_unknown does not exist (any more).\n")
    assert run("replay").exit_code == 2


def test_disabled_urls_are_listed_and_enabled(listed: Outbox, run: Callable[..., Any]) -> None:
    listed.disable("https://shop.test/gone", 60)
    assert run("disabled").stdout.startswith("https://shop.test/gone\t20")
    assert run("enable", "https://shop.test/gone").exit_code == 0
    assert run("enable", "https://shop.test/gone").exit_code == 1
    assert run("disabled").stdout == ""


def test_hosts_are_told_apart_by_their_ports() -> None:
    assert delivery(url="https://Shop.test:8443/a").host == "shop.test:8443"


def test_many_deliveries_to_one_host_are_sent_as_fast_as_it_accepts_them(outbox: Outbox) -> None:
    for number in range(200):
        outbox.add(delivery(number))
    post = Answers()
    started = time.monotonic()
    with dispatching(outbox, post):
        counted(outbox, pending=0, delivered=200)
    assert time.monotonic() - started < 5
    assert len({found.id for found in post.posted}) == len(post.posted) == 200
