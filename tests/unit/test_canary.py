"""The canary: jobs that run again alone, and an engine whose answers depend on company."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from config.settings import Settings
from tasks.results import Receipt
from tests.support.canary import outcomes
from tests.support.engines import SOON, running
from tests.support.rows import row
from tests.support.waiting import eventually
from tests.unit.service.jobs import complete
from worker.engine.interfaces import Admit, SendHeartbeat
from worker.engine.row import Output, Picture, Row
from worker.jobs import canary as module
from worker.jobs.canary import Canary, difference, is_chosen
from worker.jobs.row_builder import joined, others
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeModel
from worker.observability.metrics import CANARY

RECEIPT = Receipt(model="fake", dtype="float32", prompt="p", output="o")
OUTPUT = Output((1, 2), "length")


@pytest.fixture
def counted() -> Callable[[str], float]:
    """How often an outcome was counted since the test began."""
    before = outcomes()
    return lambda outcome: outcomes()[outcome] - before[outcome]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.01)


class WrongInCompany(FakeModel):
    """A model with a defect: in a batch of several rows each gets a wrong second token."""

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        if len(rows) == 1:
            super().run(rows, heartbeat, admit)
            return
        for one in rows:
            ids = one.tokens.ids[-one.max_steps :]
            one.finish(Output((ids[0], ids[1] + 1, *ids[2:]), "length"))


def answers(model: FakeModel, counted: Callable[[str], float], count: int = 4) -> list[str]:
    """The answers of jobs that are sent together, of which every one is chosen and has run again."""
    start = threading.Barrier(count)
    with running(model) as engine:
        service = Service(Settings(), model.info, model.codec, engine, canary=Canary(1.0, engine))

        def ask(number: int) -> str:
            start.wait(SOON)
            return service.run(complete("the red door", max_new_tokens=4), JobContext(id=str(number))).text

        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(ask, range(count)))
        eventually(lambda: sum(map(counted, CANARY)) == count)
    return found


def test_an_answer_that_depends_on_company_is_found_and_logged_with_its_receipt(
    counted: Callable[[str], float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, module.__name__)
    wrong = answers(WrongInCompany(), counted).count("dpor")
    assert wrong >= 2
    assert counted("diverged") == wrong
    assert counted("identical") == 4 - wrong
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == wrong
    assert all("differ in token 2" in line and '"model":"fake"' in line for line in logged)


def test_right_answers_are_identical_alone(counted: Callable[[str], float]) -> None:
    assert answers(FakeModel(), counted) == ["door"] * 4
    assert (counted("identical"), counted("diverged")) == (4, 0)


# Which jobs


def test_the_share_of_jobs_is_chosen_by_their_ids() -> None:
    ids = [f"job-{number}" for number in range(10_000)]
    chosen = [id for id in ids if is_chosen(id, 0.01)]
    assert 60 <= len(chosen) <= 140
    assert chosen == [id for id in ids if is_chosen(id, 0.01)]
    assert set(chosen) < {id for id in ids if is_chosen(id, 0.1)}
    assert all(is_chosen(id, 1.0) for id in ids)


class Busy:
    """An engine that is never idle until it is told."""

    def __init__(self) -> None:
        self.is_idle = False
        self.rows: list[Row] = []
        self.interruptions = 0

    def submit(self, row: Row) -> Future[Output]:
        self.rows.append(row)
        if len(self.rows) <= self.interruptions:
            row.finish(Output((), "canceled"))
        else:
            row.finish(OUTPUT)
        return row.output


@pytest.mark.parametrize("reason", ["canceled", "deadline"])
def test_a_job_that_was_interrupted_is_not_taken(reason: str, counted: Callable[[str], float]) -> None:
    engine = Busy()
    engine.is_idle = True
    canary = Canary(1.0, engine)
    canary.offer("job", row(), Output((1,), reason), RECEIPT)  # type: ignore[arg-type]
    canary.offer("other", row(), OUTPUT, RECEIPT)
    eventually(lambda: counted("identical") == 1)
    assert len(engine.rows) == 1


def test_jobs_wait_until_the_engine_is_idle_and_those_beyond_the_bound_are_dropped(
    counted: Callable[[str], float],
) -> None:
    engine = Busy()
    canary = Canary(1.0, engine)
    for number in range(module.MAX_KEPT + 3):
        canary.offer(str(number), row(), OUTPUT, RECEIPT)
    assert (counted("dropped"), engine.rows) == (3, [])
    engine.is_idle = True
    eventually(lambda: counted("identical") == module.MAX_KEPT)
    assert all(one.alone and one.gives_way for one in engine.rows)


def test_the_bytes_of_kept_pictures_are_bounded(
    monkeypatch: pytest.MonkeyPatch, counted: Callable[[str], float]
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    monkeypatch.setattr(Picture, "nbytes", property(lambda self: 60))
    engine = Busy()
    canary = Canary(1.0, engine)
    for number in range(2):
        canary.offer(str(number), row(pictures=(Picture(b"key", None),)), OUTPUT, RECEIPT)
    assert counted("dropped") == 1
    engine.is_idle = True
    eventually(lambda: counted("identical") == 1)


@pytest.mark.parametrize(("interruptions", "outcome"), [(2, "identical"), (3, "dropped")])
def test_a_job_that_others_interrupt_is_tried_again_twice(
    interruptions: int, outcome: str, counted: Callable[[str], float]
) -> None:
    engine = Busy()
    engine.is_idle, engine.interruptions = True, interruptions
    Canary(1.0, engine).offer("job", row(), OUTPUT, RECEIPT)
    eventually(lambda: counted(outcome) == 1)


def test_a_job_that_fails_alone_is_counted(counted: Callable[[str], float]) -> None:
    class Broken(Busy):
        def submit(self, row: Row) -> Future[Output]:
            row.fail(ValueError("boom"))
            return row.output

    engine = Broken()
    engine.is_idle = True
    Canary(1.0, engine).offer("job", row(), OUTPUT, RECEIPT)
    eventually(lambda: counted("failed") == 1)


class Sampled(Busy):
    """An engine that is idle, whose answers are their seeds."""

    is_idle = True  # type: ignore[assignment]

    def __init__(self) -> None:
        self.rows, self.interruptions = [], 0

    def submit(self, row: Row) -> Future[Output]:
        self.rows.append(row)
        seed = row.sampling.seed
        row.finish(Output((seed or 0,), "canceled" if len(self.rows) == self.interruptions else "length"))
        return row.output


def several(engine: Sampled) -> tuple[Row, Output]:
    """A job of three samples, and its output by an engine."""
    job = row(temperature=1.0, seed=5, answers=3)
    return job, joined([engine.submit(each).result() for each in (job, *others(job))])


@pytest.mark.parametrize("interruptions", [0, 2])
def test_each_of_several_answers_runs_again(interruptions: int, counted: Callable[[str], float]) -> None:
    job, output = several(Sampled())
    engine = Sampled()
    engine.interruptions = interruptions
    Canary(1.0, engine).offer("job", job, output, RECEIPT)
    eventually(lambda: counted("identical") == 1)
    # After an interruption all of them do.
    assert len(engine.rows) == interruptions + 3
    assert all(one.alone and one.gives_way for one in engine.rows)
    assert len({one.tokens.salt for one in engine.rows}) == len(engine.rows)


def test_a_further_answer_that_differs_is_found(
    counted: Callable[[str], float], caplog: pytest.LogCaptureFixture
) -> None:
    job, output = several(Sampled())
    wrong = replace(output.others[1], ids=(1,))
    Canary(1.0, Sampled()).offer("job", job, replace(output, others=(output.others[0], wrong)), RECEIPT)
    eventually(lambda: counted("diverged") == 1)
    assert "differ in token 1 of answer 3" in caplog.text


def test_several_answers_of_which_one_was_interrupted_are_not_taken(counted: Callable[[str], float]) -> None:
    job, output = several(Sampled())
    cut = replace(output.others[1], finish_reason="deadline")
    engine = Sampled()
    canary = Canary(1.0, engine)
    canary.offer("job", job, replace(output, others=(output.others[0], cut)), RECEIPT)
    canary.offer("other", *several(Sampled()), RECEIPT)
    eventually(lambda: counted("identical") == 1)
    assert len(engine.rows) == 3


# What differs


@pytest.mark.parametrize(
    ("again", "where"),
    [
        (Output((1, 2), "length"), None),
        (Output((1, 3), "length"), "token 2"),
        (Output((1,), "length"), "token 2"),
        (Output((1, 2, 3), "length"), "token 3"),
        (Output((1, 2), "stop"), "the finish reason"),
        (Output((1, 2), "length", others=(Output((), "stop"),)), "the number of answers"),
    ],
)
def test_the_first_difference_of_tokens(again: Output, where: str | None) -> None:
    assert difference(OUTPUT, again, 0.0) == where


@pytest.mark.parametrize(
    ("again", "where"), [((0.6, 0.4), None), ((0.601, 0.399), None), ((0.7, 0.3), "the probabilities"),
                         ((0.4, 0.6), "the label")],
)  # fmt: skip
def test_the_first_difference_of_labels(again: tuple[float, ...], where: str | None) -> None:
    assert difference(Output((), "stop", (0.6, 0.4)), Output((), "stop", again), 0.002) == where
