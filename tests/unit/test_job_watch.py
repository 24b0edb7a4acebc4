"""What watchers see of a job, read from a real Redis as workers write it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import states
from celery.exceptions import TaskRevokedError

from tasks import (
    BrokerUnavailable,
    Client,
    Complete,
    EndUpdate,
    ImageBlocked,
    JobCanceled,
    JobTimeout,
    RestartedUpdate,
    StageUpdate,
    SubmittedJob,
    TextUpdate,
    Update,
    result_wait,
    server_sent_event,
)
from tasks.queue_position import MAX_BYTES, positions_of
from tasks.redis_keys import UPDATES
from tasks.testing import canned
from tests.support.hostile_text import HOSTILE
from tests.support.waiting import SOON_S
from tests.unit.client.messages import away
from worker.demo import stack

JOB = Complete(prompt=["Hello"], stream=True)
RUNNING = StageUpdate("running")


@pytest.fixture
def client(broker: stack.Broker) -> Iterator[Client]:
    with broker.connect() as server:
        server.flushall()
    client = Client(broker.url)
    yield client
    client.app.close()


class Worker:
    """Writes what a worker would."""

    def __init__(self, client: Client, id: str = "a") -> None:
        self.job = client.job(id)
        self._backend: Any = client.app.backend

    def write(self, run: str, **fields: str) -> None:
        self._backend.client.xadd(UPDATES.named(self.job.id), {"run": run, **fields})

    def end(self, outcome: Any, state: str = states.SUCCESS) -> None:
        self._backend.store_result(self.job.id, outcome, state)

    def answer(self, text: str) -> None:
        self.end(canned(text, JOB).model_dump(mode="json"))


@pytest.fixture
def worker(client: Client) -> Worker:
    return Worker(client)


def seen(job: SubmittedJob) -> list[Update]:
    """All but the end, which is checked."""
    *updates, end = job.watch(timeout=SOON_S)
    assert isinstance(end, EndUpdate)
    return updates


def text(updates: list[Update]) -> str:
    """What a watcher has on the screen."""
    shown = ""
    for update in updates:
        shown = "" if isinstance(update, RestartedUpdate) else shown
        shown += update.text if isinstance(update, TextUpdate) else ""
    return shown


def test_who_comes_late_sees_all_of_it(worker: Worker) -> None:
    worker.write("1", stage="loading_images")
    worker.write("1", stage="running", text=" A cat")
    worker.write("1", text=" on a mat.", end="1")
    worker.answer(" A cat on a mat.")
    expected = [StageUpdate("loading_images"), RUNNING, TextUpdate(" A cat"), TextUpdate(" on a mat.")]
    assert seen(worker.job) == seen(worker.job) == expected


def test_a_long_stream_is_read_in_pages(worker: Worker) -> None:
    for number in range(2_500):
        worker.write("1", text=f"{number} ")
    worker.answer("".join(f"{number} " for number in range(2_500)))
    assert len(seen(worker.job)) == 2_500


def test_who_comes_after_the_stream_has_the_result_alone(worker: Worker) -> None:
    worker.answer("A cat.")
    (end,) = worker.job.watch(timeout=SOON_S)
    assert isinstance(end, EndUpdate)
    assert (end.status, end.result().text) == ("succeeded", "A cat.")


def test_a_job_that_runs_again_starts_its_text_anew(worker: Worker) -> None:
    worker.write("1", stage="running", text="A do")
    worker.write("2", stage="running", text="A cat")
    # A frozen worker wakes up.
    worker.write("1", text="g")
    worker.write("2", text=".")
    worker.answer("A cat.")
    assert seen(worker.job) == [
        RUNNING, TextUpdate("A do"), RestartedUpdate(), RUNNING, TextUpdate("A cat"), TextUpdate("."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        (["A cat"], "A cat on a mat."),
        # The beginning was trimmed; the frozen worker was first.
        (["mat."], "A cat on a mat."),
        ([], "A cat."),
        (["A cat."], ""),
    ],
)
def test_whatever_a_stream_lacks_the_text_is_the_results(worker: Worker, pieces: list[str], answer: str) -> None:
    worker.write("1", stage="running")
    for piece in pieces:
        worker.write("1", text=piece)
    worker.answer(answer)
    assert text(seen(worker.job)) == answer


def test_a_label_is_not_told_as_text(worker: Worker) -> None:
    worker.write("1", stage="running", end="1")
    worker.end(canned("cat", JOB).model_copy(update={"label": "cat"}).model_dump(mode="json"))
    assert seen(worker.job) == [RUNNING]


def test_an_end_tells_its_error(client: Client) -> None:
    failed, canceled = Worker(client, "failed"), Worker(client, "canceled")
    failed.end(ImageBlocked("Use another."), states.FAILURE)
    (end,) = failed.job.watch(timeout=SOON_S)
    assert isinstance(end, EndUpdate)
    assert end.status == "failed"
    assert end.data()["error"]["code"] == "image_blocked"
    with pytest.raises(ImageBlocked):
        end.result()
    canceled.write("1", stage="running", text="A c")
    canceled.end(TaskRevokedError("terminated", canned("A cat", JOB).model_dump(mode="json")), states.REVOKED)
    *updates, end = canceled.job.watch(timeout=SOON_S)
    assert isinstance(end, EndUpdate)
    assert (end.status, text(updates)) == ("canceled", "A cat")
    with pytest.raises(JobCanceled):
        end.result()


def test_a_job_that_is_not_streamed_has_its_stages_by_celerys_states(worker: Worker) -> None:
    told: list[Update] = []
    for update in worker.job.watch(timeout=SOON_S):
        told.append(update)
        if update == StageUpdate("queued"):
            worker.end(None, states.STARTED if len(told) == 1 else states.SUCCESS)
        elif update == RUNNING:
            worker.answer("A cat.")
    assert told[:-1] == [StageUpdate("queued"), RUNNING]


def test_a_job_that_waits_for_its_retry_is_queued(worker: Worker) -> None:
    worker.write("1", stage="running", text="A")
    worker.end(ImageBlocked("later"), states.RETRY)
    watch = worker.job.watch(timeout=SOON_S)
    assert [next(watch) for _ in range(3)] == [RUNNING, TextUpdate("A"), StageUpdate("queued")]
    worker.write("2", stage="running", text="A cat")
    assert [next(watch) for _ in range(3)] == [RestartedUpdate(), RUNNING, TextUpdate("A cat")]
    worker.answer("A cat")
    assert isinstance(next(watch), EndUpdate)


def test_while_redis_is_away_nothing_is_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_wait, "AWAY_S", 0.2)
    away(client, math.inf, monkeypatch)
    told: list[Update] = []
    with pytest.raises(BrokerUnavailable):
        told += client.job("a").watch()
    assert told == []


def test_a_watch_outlasts_a_restart_of_redis(worker: Worker, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.write("1", text="A cat.")
    worker.answer("A cat.")
    away(client, 3, monkeypatch)
    assert text(seen(worker.job)) == "A cat."


def test_a_watch_has_a_timeout(client: Client) -> None:
    watch = client.job("nobody").watch(timeout=0.2)
    assert next(watch) == StageUpdate("queued")
    with pytest.raises(JobTimeout):
        list(watch)


def test_a_user_without_a_right_to_the_stream_has_the_result(
    worker: Worker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise redis.exceptions.NoPermissionError("no permissions")

    worker.write("1", text="A cat.")
    worker.answer("A cat.")
    monkeypatch.setattr(client.app.backend.client, "xrange", refuse)
    assert seen(worker.job) == []


def test_many_watch_in_asyncio(client: Client) -> None:
    async def watched(worker: Worker) -> list[Update]:
        return [update async for update in worker.job.awatch(timeout=SOON_S)]

    async def story() -> list[list[Update]]:
        watches = [asyncio.create_task(watched(worker)) for worker in workers]
        await asyncio.sleep(0.1)
        for worker in workers:
            worker.write("1", text="A cat.")
            worker.answer("A cat.")
        return await asyncio.gather(*watches)

    workers = [Worker(client, str(number)) for number in range(20)]
    for updates in asyncio.run(story()):
        assert (text(updates), type(updates[-1])) == ("A cat.", EndUpdate)


# Positions


def test_a_waiting_job_has_its_place_in_the_queue(client: Client) -> None:
    jobs = [client.submit(JOB, priority=5) for _ in range(3)]
    last, urgent = client.submit(JOB, priority=9), client.submit(JOB, priority=0)
    ahead = {job.id: next(job.watch(timeout=SOON_S)) for job in (urgent, *jobs, last)}
    assert list(ahead.values()) == [StageUpdate("queued", ahead=number) for number in range(5)]
    # From another process, which knows the id alone.
    other = Client(client.app.conf.broker_write_url)
    assert next(other.job(jobs[1].id).watch(timeout=SOON_S)) == StageUpdate("queued", ahead=2)
    assert next(client.job("taken").watch(timeout=SOON_S)) == StageUpdate("queued")


def test_behind_large_messages_a_position_is_a_bound_and_the_look_is_short(client: Client) -> None:
    large = Complete(prompt=["x" * 190_000])
    jobs = [client.submit(large) for _ in range(3 + MAX_BYTES // 190_000)]
    last, less_urgent = client.submit(JOB), client.submit(JOB, priority=9)
    assert next(jobs[1].watch(timeout=SOON_S)) == StageUpdate("queued", ahead=1)
    assert next(last.watch(timeout=SOON_S)) == StageUpdate("queued", ahead=len(jobs))
    assert next(less_urgent.watch(timeout=SOON_S)) == StageUpdate("queued", ahead=len(jobs) + 1)


def test_redis_is_asked_once_a_second_for_all_watchers(client: Client, broker: stack.Broker) -> None:
    jobs = [client.submit(JOB) for _ in range(30)]
    positions = positions_of(client.app)
    before = broker.connect().info("commandstats").get("cmdstat_eval", {"calls": 0})["calls"]
    assert [positions.ahead(client.queue, job.id, 5) for job in jobs] == list(range(30))
    assert broker.connect().info("commandstats")["cmdstat_eval"]["calls"] == before + 1


# Hostile text


def test_no_text_breaks_out_of_a_server_sent_event(worker: Worker) -> None:
    hostile = HOSTILE + "\n\nevent: end\ndata: {}\n\n"
    worker.write("1", stage="running", text=hostile.encode(errors="replace").decode())
    worker.answer(hostile)
    *updates, end = worker.job.watch(timeout=SOON_S)
    assert text(updates) == hostile
    for update in (*updates, end):
        event = server_sent_event(update)
        head, data, *rest = event.split("\n")
        assert (head, rest, event.isascii()) == (f"event: {update.kind}", ["", ""], True)
        assert json.loads(data.removeprefix("data: ")) == update.data()
        assert not any(ord(char) < 32 for char in data)
