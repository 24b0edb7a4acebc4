"""Rows that join a running batch, and rows that are left to other workers."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from tasks.errors import Internal
from tests.support.engines import LIMITS, PICTURE, SOON, Gate, Joinable, Recorder, running, submit, text
from tests.support.rows import row
from tests.support.waiting import eventually
from worker.engine import engine as engines
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits

# Admit


def test_a_row_that_arrives_while_others_run_joins_them() -> None:
    runner = Joinable(step_s=0.005)
    with running(runner) as engine:
        (long,) = submit(engine, row("long", wanted=1000))
        time.sleep(0.05)
        (short,) = submit(engine, row("short", wanted=1))
        assert text(short) == "short"
        assert not long.is_done
        engine.cancel(long)
    assert runner.batches == [["long", "short"]]


def test_a_running_batch_waits_for_a_row_that_comes_soon() -> None:
    runner = Joinable()
    with running(runner, limits=Limits(rows=8, tokens=10_000)) as engine:
        (second,) = submit(engine, row("second", wanted=1, pictures=(PICTURE,)))
        # Without the wait its steps, which take no time, would be over long before the other arrives.
        (first,) = submit(engine, row("first", wanted=50))
        time.sleep(0.08)
        runner.encoded.pop()(1)
        assert text(second) == "second"
        assert second.cached_images == 1
        assert text(first) == "first"
    assert runner.batches == [["first", "second"]]


@pytest.mark.parametrize(("prefill_steps", "waits"), [(0, True), (3, False)])
def test_a_batch_waits_for_others_only_once_its_prompts_are_prefilled(
    prefill_steps: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "JOIN_WAIT_S", 2 * SOON)
    runner = Joinable(prefill_steps=prefill_steps)
    with running(runner) as engine:
        (second,) = submit(engine, row("second", wanted=1, pictures=(PICTURE,)))
        (first,) = submit(engine, row("first", wanted=3))
        if waits:
            time.sleep(0.05)
            assert not first.is_done
        else:
            assert text(first) == "first"
        runner.encoded.pop()(0)
        assert text(second) == "second"


class Helped(Joinable):
    """Encodes when the engine helps."""

    def help(self, within_s: float) -> bool:
        helped = bool(self.encoded)
        while self.encoded:
            self.encoded.pop()(0)
        return helped


def test_a_batch_that_waits_for_a_row_helps_to_encode_its_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "JOIN_WAIT_S", 2 * SOON)
    runner = Helped(step_s=0.001)
    with running(runner, Limits(rows=8, tokens=1_000_000)) as engine:
        (first,) = submit(engine, row("first", wanted=50_000))
        eventually(lambda: first.first_token > 0)
        for word in ("second", "third"):
            (shown,) = submit(engine, row(word, wanted=1, pictures=(PICTURE,)))
            assert text(shown) == word
        engine.cancel(first)
    assert runner.batches == [["first", "second", "third"]]


def test_an_idle_engine_helps_as_soon_as_pictures_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "IDLE_HEARTBEAT_S", 2 * SOON)
    with running(Helped()) as engine:
        time.sleep(0.05)
        (shown,) = submit(engine, row("shown", wanted=1, pictures=(PICTURE,)))
        assert text(shown) == "shown"


def test_a_running_batch_does_not_wait_forever_for_a_joining_row() -> None:
    with running(Joinable()) as engine:
        submit(engine, row("never", pictures=(PICTURE,)))
        (only,) = submit(engine, row("only", wanted=50))
        assert text(only) == "only"


def test_a_row_that_joined_is_told_when_it_started() -> None:
    with running(Joinable(step_s=0.005)) as engine:
        (long,) = submit(engine, row("long", wanted=1000))
        time.sleep(0.05)
        (short,) = submit(engine, row("short", wanted=1))
        assert text(short) == "short"
        engine.cancel(long)
    assert long.started < short.arrived <= short.started


def test_a_row_that_joined_and_fails_fails_alone() -> None:
    with running(Joinable(step_s=0.005)) as engine:
        (long,) = submit(engine, row("long", wanted=30))
        time.sleep(0.02)
        (poison,) = submit(engine, row("poison", wanted=5))
        with pytest.raises(Internal):
            text(poison)
        assert text(long) == "long"


def test_no_row_joins_rows_that_run_again_after_a_failure() -> None:
    # Admit would be suspects too, and with enough of them the culprit would never be alone.
    runner = Joinable()
    with running(runner, Limits(rows=2, tokens=10_000)) as engine:
        rows = submit(engine, row("poison", priority=0), *[row(f"row {n}", wanted=3) for n in range(20)])
        with pytest.raises(Internal):
            text(rows[0])
        assert [text(row) for row in rows[1:]] == [f"row {n}" for n in range(20)]
    assert len([batch for batch in runner.batches if "poison" in batch]) <= 2


def test_no_row_joins_a_batch_that_is_over() -> None:
    # A row that runs alone may come next.
    runner = Joinable(step_s=0.005)
    with running(runner) as engine:
        rows = submit(engine, row("single", wanted=10))
        time.sleep(0.02)
        late = row("alone", wanted=3)
        late.alone = True
        rows += submit(engine, late)
        assert [text(row) for row in rows] == ["single", "alone"]
    assert runner.batches == [["single"], ["alone"]]


def test_a_few_of_many_waiting_rows_join_once_no_row_has_joined_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "GROUP_WAIT_S", 0.1)
    runner = Joinable(step_s=0.005)
    with running(runner, Limits(rows=16, tokens=100_000)) as engine:
        long = submit(engine, *[row(f"long {n}", wanted=1_000) for n in range(15)])
        time.sleep(0.05)
        short = submit(engine, *[row(f"short {n}", wanted=1) for n in range(2)])
        assert [text(row) for row in short] == ["short 0", "short 1"]
        assert not any(row.is_done for row in long)
        for one in long:
            engine.cancel(one)


def test_a_batch_waits_for_those_that_come_once_while_the_first_cannot_join() -> None:
    runner = Joinable(step_s=0.001)
    with running(runner) as engine:
        submit(engine, row("never", pictures=(PICTURE,)))
        (single,) = submit(engine, row("single", wanted=50))
        time.sleep(0.05)
        late = row("alone", wanted=3)
        late.alone = True
        submit(engine, late)
        started = time.monotonic()
        assert text(single) == "single"
        assert time.monotonic() - started < 1.0


def test_a_busy_engine_forgets_rows_that_are_over() -> None:
    # Under load a batch that rows can join never ends, and a row holds its pictures.
    with running(Joinable(step_s=0.001), Limits(rows=8, tokens=1_000_000)) as engine:
        (long,) = submit(engine, row("long", wanted=5_000))
        gone = []
        for _ in range(20):
            (short,) = submit(engine, row("short", wanted=1))
            assert text(short) == "short"
            gone.append(weakref.ref(short.output))
            del short
        time.sleep(0.02)
        gc.collect()
        kept = sum(reference() is not None for reference in gone)
        assert not long.is_done
        engine.cancel(long)
    assert kept <= 1


def test_no_row_joins_an_engine_that_stops() -> None:
    runner = Joinable(step_s=0.005)
    engine = Engine(runner, LIMITS)
    engine.start()
    (long,) = submit(engine, row("long", wanted=20))
    time.sleep(0.03)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    time.sleep(0.01)
    late = [row("late", wanted=20) for _ in range(3)]
    for one in late:
        engine.submit(one)
        time.sleep(0.01)
    stopping.join(SOON)
    assert text(long) == "long"
    assert runner.batches == [["long"]]


# Rows that are better left to other workers


def test_rows_that_wait_for_long_are_withdrawn_the_least_urgent_and_latest_first() -> None:
    gate = Gate()
    with running(gate) as engine:
        (first,) = submit(engine, row("first", arrived=0.0))
        assert gate.entered.wait(SOON)
        old = [row(f"old {n}", arrived=float(n), priority=p) for n, p in enumerate((5, 5, 5, 0))]
        submit(engine, *old, young := row("young"))
        assert engine.withdraw([first, *old, young], 2) == [old[2], old[1]]
        assert engine.withdraw([first, *old, young], 9) == [old[0], old[3]]
        gate.opened.set()
        assert text(young) == "young"
    assert gate.batches == [["first"], ["young"]]


def test_a_row_is_withdrawn_while_its_pictures_are_encoded() -> None:
    recorder = Recorder()
    with running(recorder) as engine:
        shown = row("shown", pictures=(PICTURE,), arrived=0.0)
        submit(engine, shown)
        assert engine.withdraw([shown], 1) == [shown]
        recorder.encoded.pop()(0)
        assert text(submit(engine, row("next"))[0]) == "next"
    assert recorder.batches == [["next"]]


def test_an_engine_with_nothing_to_run_has_room_for_a_batch() -> None:
    with running(Recorder()) as engine:
        assert engine.throughput.capacity == LIMITS.rows
        text(submit(engine, row())[0])
        eventually(lambda: engine.throughput.capacity == LIMITS.rows)


def test_no_row_joins_a_batch_that_does_not_admit() -> None:
    gate = Gate()
    with running(gate) as engine:
        submit(engine, row())
        assert gate.entered.wait(SOON)
        assert engine.throughput.capacity == 1
        eventually(lambda: 0.05 < engine.throughput.closed_s < SOON)
        gate.opened.set()
        eventually(lambda: engine.throughput.closed_s == 0)


def test_the_capacity_is_what_a_running_batch_can_admit() -> None:
    with running(Joinable(step_s=0.01)) as engine:
        submit(engine, long := row(wanted=1_000))
        eventually(lambda: engine.throughput.capacity == LIMITS.rows)
        assert engine.throughput.closed_s == 0
        submit(engine, beams := row(wanted=1_000, beams=LIMITS.rows))
        eventually(lambda: engine.throughput.capacity == 1)
        engine.cancel(long)
        engine.cancel(beams)


def test_the_pace_is_that_of_the_last_rows_and_known_before_the_first_one_ends() -> None:
    with running(Joinable(step_s=0.01)) as engine:
        assert engine.throughput.job_s == 0
        submit(engine, long := row(wanted=1_000))
        eventually(lambda: engine.throughput.job_s > 0.1)
        engine.cancel(long)
        for _ in range(40):
            text(submit(engine, row(wanted=1))[0])
        eventually(lambda: engine.throughput.job_s < 0.1)


def test_the_width_is_that_of_batches_that_others_wait_for() -> None:
    with running(Joinable(step_s=0.001)) as engine:
        assert engine.throughput.width == LIMITS.rows
        rows = submit(engine, *[row(wanted=50, beams=4) for _ in range(8)])
        for each in rows:
            text(each)
        assert 2 <= engine.throughput.width < LIMITS.rows
