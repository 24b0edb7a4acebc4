"""Rows that end early, the end of the engine, and its heartbeats."""

from __future__ import annotations

import threading
import time
from concurrent.futures import TimeoutError as NotInTime

import pytest

from tasks.errors import DeadlineExceeded, Internal
from tests.support.engines import LIMITS, PICTURE, SOON, Gate, Recorder, running, submit, text
from tests.support.rows import row
from worker.engine.engine import Engine
from worker.engine.row import Output
from worker.models.fake import FakeModel

# Ends


def test_a_row_canceled_while_it_waits_does_not_run() -> None:
    gate = Gate()
    with running(gate) as engine:
        first, second = row("first"), row("second")
        engine.submit(first)
        assert gate.entered.wait(SOON)
        engine.submit(second)
        engine.cancel(second)
        gate.opened.set()
        assert second.output.result(SOON) == Output((), "canceled")
        assert text(first) == "first"
    assert gate.batches == [["first"]]


def test_a_row_canceled_while_it_runs_ends_at_its_next_step_with_its_text() -> None:
    with running(FakeModel(step_s=0.01)) as engine:
        one, neighbour = submit(engine, row("a" * 50, wanted=50), row("abc", wanted=3))
        neighbour.output.result(SOON)
        engine.cancel(one)
        output = one.output.result(SOON)
    assert output.finish_reason == "canceled"
    assert 3 <= len(output.ids) < 50


def test_a_fake_batch_ends_with_its_last_row() -> None:
    with running(FakeModel(step_s=0.05)) as engine:
        (one,) = submit(engine, row("a" * 100, wanted=100))
        time.sleep(0.05)
        engine.cancel(one)
        started = time.monotonic()
        submit(engine, row("next", wanted=1))[0].output.result(SOON)
        assert time.monotonic() - started < 2.5


def test_a_row_whose_deadline_passes_while_it_waits_fails() -> None:
    gate = Gate()
    with running(gate) as engine:
        submit(engine, row("first"))
        assert gate.entered.wait(SOON)
        late = row("late", deadline=time.monotonic() + 0.01)
        submit(engine, late)
        time.sleep(0.02)
        gate.opened.set()
        with pytest.raises(DeadlineExceeded):
            text(late)
    assert gate.batches == [["first"]]


def test_a_row_whose_deadline_passes_while_it_runs_ends_with_its_text() -> None:
    with running(FakeModel(step_s=0.01)) as engine:
        output = engine.submit(row("a" * 50, wanted=50, deadline=time.monotonic() + 0.1)).result(SOON)
    assert output.finish_reason == "deadline"
    assert 0 < len(output.ids) < 50


def test_an_idle_engine_encodes_pictures_itself() -> None:
    class Helped(Recorder):
        def help(self, within_s: float) -> bool:
            helped = bool(self.encoded)
            while self.encoded:
                self.encoded.pop()(0)
            return helped

    engine = Engine(Helped(), LIMITS)
    seeing = submit(engine, *(row(letter, pictures=(PICTURE,)) for letter in "ab"))
    engine.start()
    assert [text(one) for one in seeing] == ["a", "b"]
    engine.stop()


def test_a_row_whose_images_are_encoded_after_the_stop_fails() -> None:
    runner = Recorder()
    with running(runner) as engine:
        (late,) = submit(engine, row(pictures=(PICTURE,)))
    runner.encoded.pop()(0)
    with pytest.raises(Internal, match="again"):
        text(late)


def test_stop_fails_what_waits_and_lets_the_running_batch_end() -> None:
    gate = Gate()
    engine = Engine(gate, LIMITS)
    engine.start()
    running_row, waiting_row = row("running"), row("waiting")
    engine.submit(running_row)
    assert gate.entered.wait(SOON)
    engine.submit(waiting_row)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    time.sleep(0.02)
    gate.opened.set()
    stopping.join(SOON)
    assert text(running_row) == "running"
    with pytest.raises(Internal, match="again"):
        text(waiting_row)


def test_a_row_submitted_after_the_stop_fails_rather_than_waits_for_ever() -> None:
    engine = Engine(FakeModel(), LIMITS)
    engine.start()
    engine.stop()
    try:
        outcome = engine.submit(row()).exception(0.2)
    except NotInTime:
        pytest.fail("nobody will ever answer this row")
    assert isinstance(outcome, Internal)


# Signs of life


def test_each_step_sends_a_heartbeat() -> None:
    beats: list[float] = []
    with running(FakeModel(), heartbeat=lambda: beats.append(time.monotonic())) as engine:
        engine.submit(row("a" * 100, wanted=100)).result(SOON)
        assert len(beats) >= 100


def test_an_idle_engine_sends_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.engine.IDLE_HEARTBEAT_S", 0.01)
    beats: list[float] = []
    with running(FakeModel(), heartbeat=lambda: beats.append(time.monotonic())):
        time.sleep(0.1)
    assert len(beats) >= 3


def test_a_hanging_runner_sends_no_heartbeat() -> None:
    gate, beats = Gate(), []
    with running(gate, heartbeat=lambda: beats.append(time.monotonic())) as engine:
        submit(engine, row())
        assert gate.entered.wait(SOON)
        before = len(beats)
        time.sleep(0.05)
        assert len(beats) == before
        gate.opened.set()
