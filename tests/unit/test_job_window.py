"""How a window sends: many jobs together, and what is left if that fails in the middle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tasks import InvalidRequest, Job, QueueFull, job_window
from tasks.batch import Batch
from tasks.testing import FakeClient


class Together:
    """Collects jobs and sends them at the end, as a Bulk."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Job, dict[str, Any]]] = []

    def submit(self, job: Job, **options: Any) -> None:
        self.jobs.append((job, options))


class BulkClient(FakeClient):
    """Notes the ids that arrive, and how many come together. `faults`: what the next sendings raise, each after so many
    of its jobs have arrived; `refusals`: what the submission of these jobs raises, by their text."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: list[str] = []
        self.together: list[int] = []
        self.faults: list[tuple[int, Exception]] = []
        self.refusals: dict[str, list[Exception]] = {}

    @contextlib.contextmanager
    def bulk(self, on_sent: Callable[[int], None] = lambda jobs: None) -> Iterator[Any]:
        together = Together()
        submit = together.submit

        def refuse_or_submit(job: Any, **options: Any) -> None:
            if refusals := self.refusals.get(job.prompt[0].text):
                raise refusals.pop()
            submit(job, **options)

        together.submit = refuse_or_submit  # type: ignore[method-assign]
        try:
            yield together
        finally:
            self._send(together.jobs)
            if together.jobs:
                on_sent(len(together.jobs))

    def _send(self, jobs: list[tuple[Job, dict[str, Any]]]) -> None:
        arriving, fault = self.faults.pop() if jobs and self.faults else (len(jobs), None)
        for job, options in jobs[:arriving]:
            self.arrived.append(options["task_id"])
            self.submit(job, **options)
        if fault:
            raise fault
        self.together += [len(jobs)] if jobs else []


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TROUBLE_PAUSE_S", "FIRST_PAUSE_S", "LAST_PAUSE_S"):
        monkeypatch.setattr(job_window, name, 0.001)


def line(number: int) -> str:
    return json.dumps({"custom_id": f"r{number}", "task": "complete", "arguments": {"prompt": [str(number)]}})


def run(batch: Batch) -> tuple[list[str], set[str]]:
    """The ids of the answered lines, in order, and what was told meanwhile."""
    answered, troubles = [], set()
    for answers in batch.turns():
        answered += [answer["custom_id"] for answer in answers]
        troubles.add(batch.trouble)
    return answered, troubles


def test_the_jobs_of_a_window_are_sent_together_and_in_order() -> None:
    client, notes = BulkClient(), list[int]()
    answered, _ = run(Batch(client, map(line, range(20)), window=10, on_sent=notes.append))
    assert sorted(answered) == sorted(f"r{number}" for number in range(20))
    assert client.together == [10, 10]
    assert notes == list(range(1, 21))
    assert [job.prompt[0].text for job in client.submitted] == [str(n) for n in range(20)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("arriving", [0, 3, 6])
def test_after_a_fault_in_the_middle_all_of_them_are_sent_again_under_the_same_ids(arriving: int) -> None:
    client, notes = BulkClient(), list[int]()
    client.faults = [(arriving, RedisConnectionError("away"))]
    batch = Batch(client, map(line, range(6)), on_sent=notes.append)
    turns = batch.turns()
    assert next(turns) == []
    assert "away" in batch.trouble
    assert notes == [], "none counts as sent"
    assert batch.in_flight == 0
    answered = [answer["custom_id"] for answers in turns for answer in answers]
    assert sorted(answered) == [f"r{number}" for number in range(6)], "each is answered once"
    assert notes == [1, 2, 3, 4, 5, 6]
    assert client.arrived[:arriving] == client.arrived[arriving : 2 * arriving]
    assert len(set(client.arrived)) == 6
    assert client.arrived[arriving:] == list(dict.fromkeys(client.arrived))


def test_of_a_queue_that_is_full_in_the_middle_the_jobs_before_are_sent_once() -> None:
    client, notes = BulkClient(), list[int]()
    client.refusals["3"] = [QueueFull("no room")]
    batch = Batch(client, map(line, range(6)), on_sent=notes.append)
    turns = batch.turns()
    first = next(turns)
    assert notes == [1, 2, 3]
    assert batch.trouble == "no room"
    answered = [answer["custom_id"] for answers in [first, *turns] for answer in answers]
    assert sorted(answered) == [f"r{number}" for number in range(6)]
    assert len(client.arrived) == 6
    assert client.together == [3, 3]


def test_a_refused_job_is_answered_before_a_later_one_is_sent() -> None:
    client, notes = BulkClient(), list[int]()
    client.refusals["2"] = [InvalidRequest("Its callback may not be called.")]
    turns = Batch(client, map(line, range(4)), on_sent=notes.append).turns()
    first = next(turns)
    assert notes == [1, 2]
    assert "error" in {answer["custom_id"]: answer for answer in first}["r2"]
    list(turns)
    assert notes == [1, 2, 4]


def test_a_refusal_and_a_fault_at_once_lose_nothing() -> None:
    client, notes = BulkClient(), list[int]()
    client.refusals["2"] = [InvalidRequest("again"), InvalidRequest("no")]
    client.faults = [(1, RedisConnectionError("away"))]
    answered, _ = run(Batch(client, map(line, range(4)), on_sent=notes.append))
    assert sorted(answered) == ["r0", "r1", "r2", "r3"]
    assert notes == [1, 2, 4]


def test_a_window_holds_no_more_jobs_than_it_may_with_those_that_could_not_be_sent() -> None:
    client = BulkClient()
    client.faults = [(0, RedisConnectionError("away"))] * 3
    answered, _ = run(Batch(client, map(line, range(20)), window=4))
    assert len(answered) == 20
    assert max(client.together) == 4


def test_the_oldest_jobs_are_asked_for_often_and_all_of_them_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Slow(BulkClient):
        """The first ten jobs end last."""

        def outcomes(self, ids: Any) -> Any:
            asked.append(len(ids))
            found = super().outcomes(ids)
            first = {*self.arrived[:10]}
            return found if found.keys() <= first else {id: found[id] for id in found.keys() - first}

    monkeypatch.setattr(job_window, "ASK_ALL_S", 0.02)
    answered, _ = run(Batch(Slow(), map(line, range(50)), window=50))
    assert len(answered) == 50
    assert {asked[0], *asked} >= {50, 10}
