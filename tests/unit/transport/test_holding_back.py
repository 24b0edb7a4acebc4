"""A paused campaign's messages are moved to those that wait in Redis for their time, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import redis
from kombu import Queue
from kombu.message import Message

from tasks.protocol import CAMPAIGN
from tasks.steering import Wanted
from tests.support.waiting import eventually
from tests.unit.transport.taker import STOCK, Start, Taker, held
from worker.observability.metrics import RETRIES
from worker.queue import due
from worker.queue.campaigns import MAX_COUNTDOWN_S, MIN_COUNTDOWN_S, CampaignWatch, hold_back
from worker.queue.due import DueJob

TASK = "idefics.caption"
PAUSED, OTHER = "0123456789ab", "ba9876543210"


class Watch(CampaignWatch):
    """One campaign is paused."""

    def __init__(self) -> None:
        super().__init__(lambda campaigns: {})
        self.remembered: list[tuple[str, DueJob]] = []

    def wanted(self, campaign: str) -> Wanted:
        return Wanted("paused" if campaign == PAUSED else "running")

    def remember(self, campaign: str, job: DueJob) -> None:
        self.remembered.append((campaign, job))


def send(taker: Taker, **headers: Any) -> None:
    taker.connection.Producer(taker.channel, serializer="json").publish(
        "a",
        headers={"id": "a", "task": TASK, CAMPAIGN: PAUSED, **headers},
        routing_key="jobs",
        declare=[Queue("jobs")],
    )


def taken(taker: Taker, **headers: Any) -> Message:
    send(taker, **headers)
    return taker.take()


def counted() -> float:
    samples = [sample for metric in RETRIES.collect() for sample in metric.samples]
    return sum(each.value for each in samples if each.name.endswith("_total") and each.labels["task"] == TASK)


def held_back(message: Message, arguments: Mapping[str, Any] | None = None) -> bool:
    return hold_back(message, arguments or {}, Watch())


def test_a_paused_campaigns_message_waits_and_comes_again_as_it_was(start: Start, server: redis.Redis) -> None:
    taker, before = start(), counted()
    send(taker)
    (key,) = server.scan_iter("jobs*")
    (raw,) = server.lrange(key, 0, -1)
    message = taker.take()
    assert held_back(message)
    eventually(lambda: held(server) == (0, 0, 0))
    ((kept, at),) = server.zrange(f"idefics:due:{key.decode()}", 0, -1, withscores=True)
    assert kept == raw
    assert MIN_COUNTDOWN_S <= at - taker.channel.taken_at <= MAX_COUNTDOWN_S + 1
    assert counted() == before + 1
    # It is found by its id, as for a cancellation, and comes when it is due.
    assert server.zcard("idefics:due-ids") == 1
    server.zadd(f"idefics:due:{key.decode()}", {raw: 1})
    assert taker.take().decode() == "a"


@pytest.mark.parametrize("prefix", ["", "mine:"])
def test_jobs_that_were_held_back_are_made_due_in_their_order(start: Start, server: redis.Redis, prefix: str) -> None:
    taker, watch = start(global_keyprefix=prefix), Watch()
    for name in "abc":
        assert hold_back(taken(taker, id=name), {}, watch)
    campaigns, jobs = zip(*watch.remembered, strict=True)
    assert campaigns == (PAUSED,) * 3
    gone = DueJob("d", jobs[0].key, 1.5)
    eventually(lambda: server.zcard(f"{prefix}idefics:due-ids") == 3)
    in_order = sorted(jobs[:2], key=lambda job: job.score)
    for _ in range(2):
        # The second time none is where it was.
        due.hasten(taker.channel, [*in_order, gone])
    found = [taker.take().headers["id"] for _ in in_order]
    assert found == [job.id for job in in_order]
    ((_, at),) = server.zrange(jobs[2].key, 0, -1, withscores=True)
    assert at == jobs[2].score
    assert server.zrange(f"{prefix}idefics:due-ids", 0, -1) == [f"c\n{jobs[2].key}".encode()]


@pytest.mark.parametrize(
    ("headers", "arguments"),
    [
        ({CAMPAIGN: OTHER}, {}),
        ({CAMPAIGN: None}, {}),
        ({"task": "unknown"}, {}),
        ({"expires": "2020-01-01T00:00:00+00:00"}, {}),
        ({}, {"deadline_s": 5.0}),
    ],
    ids=["running", "no campaign", "unknown task", "expired", "with a deadline"],
)
def test_other_messages_go_on(start: Start, headers: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert not held_back(taken(start(), **headers), arguments)


def test_a_revoked_job_ends_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due.worker_state, "revoked", {"a"})
    assert not held_back(taken(start()))


def test_with_kombus_own_channel_the_model_process_holds_jobs_back(start: Start) -> None:
    assert not held_back(taken(start(kind=STOCK)))
