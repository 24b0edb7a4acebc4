"""What a running campaign says: its rate, the time that is left, and what bounds it."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tasks.campaign import Progress
from tasks.campaign import bottleneck as module
from tasks.campaign.bottleneck import Bottleneck, bound_of
from tasks.campaign.progress import SMOOTHING_S, Rate, Tally
from tasks.cli.campaign_progress import text_of
from tasks.queue_state import QueueState
from tasks.worker_status import WorkerStatus

PROGRESS = Progress(
    rows=1_100, done=400, left_out=100, by_code={"internal": 3}, by_host={"a.example": 2}, in_flight=50, rate=10.0,
    bound="model", trouble="", is_paused=False,
)  # fmt: skip


def changed(**fields: Any) -> Progress:
    return Progress(**{**{name: getattr(PROGRESS, name) for name in PROGRESS.__slots__}, **fields})


def test_a_steady_rate_is_right_from_the_first_second_on() -> None:
    rate = Rate(0.0)
    for second in range(1, 4):
        rate.add(50, float(second))
        assert rate.per_s == pytest.approx(50)


def test_a_rate_follows_a_change_within_the_smoothing_time() -> None:
    rate = Rate(0.0)
    for second in range(1, 200):
        rate.add(100, float(second))
    for second in range(200, 200 + int(SMOOTHING_S)):
        rate.add(0, float(second))
    assert 30 < rate.per_s < 45, "a third of 100 is left"


def test_answers_at_one_moment_are_not_lost() -> None:
    rate = Rate(0.0)
    rate.add(10, 0.0)
    rate.add(10, 1.0)
    assert rate.per_s == pytest.approx(20, rel=0.05)


def test_rows_that_are_left_out_take_no_time() -> None:
    assert PROGRESS.left_s == 60
    assert changed(rows=None).left_s is None
    assert changed(rate=0.0).left_s is None
    assert changed(is_paused=True).left_s is None
    assert PROGRESS.reported().rows == 1_000


def test_an_answer_that_is_taken_back_is_not_counted() -> None:
    tally = Tally()
    tally.add("internal", "a.example")
    tally.add(None, "a.example")
    tally.add("internal", "a.example", -1)
    assert (tally.done, tally.failed) == (1, 0)


def test_the_line_of_progress_says_all() -> None:
    assert text_of(PROGRESS) == (
        "400 of 1,000 rows done, 3 failed (internal 3; a.example 2), 50 in flight, 10.0/s, about 1 min 00 s left; "
        "the model is busy"
    )
    assert text_of(changed(is_paused=True)).endswith("50 in flight; paused")
    assert text_of(changed(trouble="Redis is away.")).endswith("left; waiting: Redis is away.")
    many = text_of(changed(by_code={}, by_host=dict.fromkeys("abcde", 1)))
    assert "(a 1, b 1, c 1 and 2 more)" in many


# What bounds it


def state(workers: list[str] | None = ["w"], **by_priority: int) -> QueueState:  # noqa: B006
    found = {int(name.removeprefix("p")): count for name, count in by_priority.items()}
    return QueueState("idefics", sum(found.values()), found, 0, 0, workers, ["m"])


@pytest.mark.parametrize(
    ("queue", "worker", "in_flight", "bound"),
    [
        (state(p9=900), WorkerStatus(jobs=100, rows=16, waiting_for_host=70), 1_000, "hosts"),
        (state(p9=900), WorkerStatus(jobs=100, rows=16, waiting_for_host=20), 1_000, "model"),
        (state(p9=900, p5=1), WorkerStatus(jobs=100, rows=16), 1_000, "queue"),
        (state(p9=5_000), WorkerStatus(jobs=100, rows=16), 1_000, "queue"),
        (state(), WorkerStatus(jobs=10, rows=10), 20, "producer"),
        (state(), WorkerStatus(jobs=900, rows=16), 900, "model"),
        (state([]), WorkerStatus(), 1_000, "no worker"),
        (state(None), WorkerStatus(), 1_000, ""),
    ],
)
def test_the_bound_is_what_most_jobs_wait_for(
    queue: QueueState, worker: WorkerStatus, in_flight: int, bound: str
) -> None:
    assert bound_of(queue, [worker], 9, in_flight, 1_000) == bound


def test_a_redis_that_is_away_does_not_stop_the_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise RedisConnectionError("away")

    monkeypatch.setattr(module, "QueueReader", refuse)
    client = type("Client", (), {"app": None, "queue": "idefics"})
    assert Bottleneck(client, 9, 1_000).bound(5, 0.0) == ""
