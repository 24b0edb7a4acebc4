"""The engine's thread with the fake model and with runners that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from tasks.errors import ImageInvalid, Internal
from tests.support.engines import LIMITS, SOON, Gate, Recorder, name, running, submit, text
from tests.support.rows import row
from worker.engine.engine import Engine
from worker.engine.interfaces import Admit, SendHeartbeat
from worker.engine.row import Output, Row
from worker.engine.scheduler import Limits
from worker.models.fake import FakeModel

# Batches


class Poisoned(Recorder):
    """Fails every batch with a row called `poison` in it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        if "poison" in map(name, rows):
            self.batches.append([name(row) for row in rows])
            raise self._error
        super().run(rows, heartbeat, admit)


class Forgetful(Recorder):
    """Leaves rows called `lost` without an answer."""

    def answer(self, rows: Sequence[Row]) -> None:
        super().answer([row for row in rows if name(row) != "lost"])


def test_a_row_gets_its_answer() -> None:
    with running(FakeModel()) as engine:
        assert engine.submit(row("the red door", wanted=4)).result(SOON) == Output(
            tuple(map(ord, "door")), "length", confidence=1.0
        )


def test_the_engines_thread_is_prepared_before_its_first_batch() -> None:
    prepared: list[str] = []
    engine = Engine(FakeModel(), LIMITS, prepare=lambda: prepared.append(threading.current_thread().name))
    engine.start()
    engine.submit(row()).result(SOON)
    engine.stop()
    assert prepared == ["engine"]


def test_rows_that_wait_together_run_together() -> None:
    gate = Gate()
    with running(gate) as engine:
        submit(engine, row("first"))
        assert gate.entered.wait(SOON)
        rows = submit(engine, *[row(f"row {n}") for n in range(8)])
        gate.opened.set()
        assert [text(row) for row in rows] == [f"row {n}" for n in range(8)]
    assert gate.sizes == [1, 8]


def test_rows_that_arrive_together_run_together_on_an_idle_engine() -> None:
    model = FakeModel()
    with running(model) as engine:
        time.sleep(0.05)
        for one in submit(engine, *[row() for _ in range(8)]):
            one.output.result(SOON)
    assert model.batches == [8]


def test_each_row_gets_its_own_answer() -> None:
    with running(FakeModel()) as engine:
        rows = submit(engine, *[row(f"{n:03}", wanted=3) for n in range(50)])
        assert [text(row) for row in rows] == [f"{n:03}" for n in range(50)]


def test_rows_from_many_threads_all_get_an_answer() -> None:
    texts: dict[str, str] = {}

    def job(n: int) -> None:
        for m in range(20):
            word = f"{n}-{m}"
            texts[word] = "".join(map(chr, engine.submit(row(word, wanted=len(word))).result(SOON).ids))

    with running(FakeModel()) as engine:
        threads = [threading.Thread(target=job, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    assert len(texts) == 160
    assert all(word == answer for word, answer in texts.items())


def test_the_most_urgent_of_those_that_wait_runs_first() -> None:
    gate = Gate()
    with running(gate, Limits(rows=1, tokens=1000)) as engine:
        submit(engine, row("first"))
        assert gate.entered.wait(SOON)
        rows = submit(engine, row("later", priority=9), row("soon", priority=5), row("now", priority=0))
        gate.opened.set()
        for one in rows:
            one.output.result(SOON)
    assert gate.batches == [["first"], ["now"], ["soon"], ["later"]]


def test_a_row_knows_when_it_started() -> None:
    before = time.monotonic()
    with running(FakeModel()) as engine:
        one = row()
        engine.submit(one).result(SOON)
    assert before <= one.arrived <= one.started <= time.monotonic()


# Failures


def test_a_row_that_fails_fails_alone() -> None:
    runner = Poisoned(ValueError("boom"))
    with running(runner) as engine:
        rows = submit(engine, *[row(f"row {n}") for n in range(7)], row("poison"))
        with pytest.raises(Internal, match="ValueError"):
            text(rows[-1])
        assert [text(row) for row in rows[:-1]] == [f"row {n}" for n in range(7)]


def test_an_error_of_ours_reaches_its_caller_as_it_is() -> None:
    error = ImageInvalid("Send another.")
    with running(Poisoned(error)) as engine, pytest.raises(ImageInvalid) as raised:
        text(*submit(engine, row("poison")))
    assert raised.value is error


def test_a_defects_message_does_not_reach_the_caller() -> None:
    with running(Poisoned(ValueError("s3cr3t"))) as engine, pytest.raises(Internal) as raised:
        text(*submit(engine, row("poison")))
    assert "s3cr3t" not in str(raised.value)


def test_a_lost_device_is_told_once_and_a_lack_of_memory_never() -> None:
    class Lost(Recorder):
        def answer(self, rows: Sequence[Row]) -> None:
            if name(rows[0]) in ("lost", "memory"):
                raise RuntimeError(
                    "CUDA error: an illegal address" if name(rows[0]) == "lost" else "CUDA out of memory"
                )
            super().answer(rows)

    told: list[Exception] = []
    engine = Engine(Lost(), LIMITS, on_device_lost=told.append)
    engine.start()
    try:
        for prompt in ("lost", "memory"):
            with pytest.raises(Internal):
                engine.submit(row(prompt)).result(SOON)
        assert [str(error) for error in told] == ["CUDA error: an illegal address"]
    finally:
        engine.stop()


def test_rows_that_were_finished_before_a_failure_do_not_run_again() -> None:
    class Halfway(Recorder):
        def answer(self, rows: Sequence[Row]) -> None:
            rows[0].finish(Output((), "stop"))
            if len(self.batches) == 1:
                raise ValueError("boom")
            super().answer(rows[1:])

    runner, rows = Halfway(), [row("a", arrived=0), row("b", arrived=1), row("c", arrived=2)]
    with running(runner) as engine:
        for one in submit(engine, *rows):
            one.output.result(SOON)
    assert runner.batches == [["a", "b", "c"], ["b"], ["c"]]


def test_the_engine_goes_on_after_a_failure() -> None:
    with running(Poisoned(ValueError("boom"))) as engine:
        with pytest.raises(Internal):
            text(*submit(engine, row("poison")))
        assert text(*submit(engine, row("next"))) == "next"


def test_a_row_that_its_runner_forgets_is_internal() -> None:
    with running(Forgetful()) as engine:
        with pytest.raises(Internal):
            text(*submit(engine, row("lost")))
        assert text(*submit(engine, row("next"))) == "next"


def test_a_row_that_its_runner_forgets_among_others_is_internal_and_they_are_not() -> None:
    with running(Forgetful()) as engine:
        lost, kept = submit(engine, row("lost"), row("kept"))
        assert text(kept) == "kept"
        with pytest.raises(Internal):
            text(lost)
