"""The engine's thread with the fake model and with runners that misbehave."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager

import pytest

from tasks.errors import DeadlineExceeded, ImageInvalid, Internal, OutOfMemory
from tests.support.rows import row
from tests.support.waiting import eventually
from worker.engine import engine as engines
from worker.engine.engine import Engine
from worker.engine.interfaces import Admit, Runner, SendHeartbeat
from worker.engine.row import Output, Picture, Row
from worker.engine.scheduler import Limits
from worker.models.fake import FakeModel

LIMITS = Limits(rows=8, tokens=10_000)
PICTURE = Picture(b"key", None)
#: Seconds that a test waits for what takes milliseconds.
SOON = 5.0


@contextmanager
def running(runner: Runner, limits: Limits = LIMITS, heartbeat: SendHeartbeat = lambda: None) -> Iterator[Engine]:
    engine = Engine(runner, limits, heartbeat)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


class Recorder:
    """Finishes each row with its own prompt and remembers who ran with whom."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        #: Called with the number of images that were known, it has those of a row encoded.
        self.encoded: list[Callable[[int], None]] = []

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        self.encoded.append(then)

    def help(self, within_s: float) -> bool:
        return False

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        self.batches.append([name(row) for row in rows])
        self.answer(rows)

    def answer(self, rows: Sequence[Row]) -> None:
        for one in rows:
            if not one.is_done:
                one.finish(Output(one.tokens.ids, "stop"))

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class Gate(Recorder):
    """Holds its first batch until it is opened, so that others gather behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.opened = threading.Event()

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        self.entered.set()
        assert self.opened.wait(SOON)
        super().run(rows, heartbeat, admit)


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


class Small(Recorder):
    """A device with room for so many rows, and for none called `huge`."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def answer(self, rows: Sequence[Row]) -> None:
        if len(rows) > self._room or "huge" in map(name, rows):
            raise OutOfMemory
        super().answer(rows)


class Forgetful(Recorder):
    """Leaves rows called `lost` without an answer."""

    def answer(self, rows: Sequence[Row]) -> None:
        super().answer([row for row in rows if name(row) != "lost"])


class Joinable(Recorder):
    """Rows join at each step; each ends after as many steps as it wants. A step with a row called `poison` fails."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__()
        self._step_s = step_s

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        running, steps = list(rows), dict.fromkeys(rows, 0)
        self.batches.append([])
        while running:
            self.batches[-1] += [name(row) for row in running if steps[row] == 0]
            time.sleep(self._step_s)
            heartbeat()
            if any(name(row) == "poison" and steps[row] == 1 for row in running):
                raise ValueError("boom")
            for one in running:
                steps[one] += 1
            self.answer([row for row in running if steps[row] >= row.max_steps or row.canceled])
            running = [row for row in running if not row.is_done]
            steps = {row: steps[row] for row in running}
            joining = admit(running)
            steps |= dict.fromkeys(joining, 0)
            running += joining


def name(row: Row) -> str:
    return "".join(map(chr, row.tokens.ids))


def text(row: Row) -> str:
    return "".join(map(chr, row.output.result(SOON).ids))


def submit(engine: Engine, *rows: Row) -> list[Row]:
    for one in rows:
        engine.submit(one)
    return list(rows)


# Batches


def test_a_row_gets_its_answer() -> None:
    with running(FakeModel()) as engine:
        assert engine.submit(row("the red door", wanted=4)).result(SOON) == Output(tuple(map(ord, "door")), "length")


def test_its_thread_is_prepared_first() -> None:
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


def test_a_running_batch_waits_for_nobody_for_ever() -> None:
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


def test_nobody_joins_rows_that_run_again_after_a_failure() -> None:
    # Admit would be suspects too, and with enough of them the culprit would never be alone.
    runner = Joinable()
    with running(runner, Limits(rows=2, tokens=10_000)) as engine:
        rows = submit(engine, row("poison", priority=0), *[row(f"row {n}", wanted=3) for n in range(20)])
        with pytest.raises(Internal):
            text(rows[0])
        assert [text(row) for row in rows[1:]] == [f"row {n}" for n in range(20)]
    assert len([batch for batch in runner.batches if "poison" in batch]) <= 2


def test_nobody_joins_a_batch_that_is_over() -> None:
    # The runner chose by its first rows how it runs: beams need another way.
    runner = Joinable(step_s=0.005)
    with running(runner) as engine:
        rows = submit(engine, row("single", wanted=10))
        time.sleep(0.02)
        rows += submit(engine, row("beams", wanted=3, beams=2))
        assert [text(row) for row in rows] == ["single", "beams"]
    assert runner.batches == [["single"], ["beams"]]


def test_a_few_of_many_that_wait_join_once_nobody_has_joined_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
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
        submit(engine, row("beams", wanted=3, beams=2))
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


def test_nobody_joins_an_engine_that_stops() -> None:
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


# Memory


def test_a_batch_too_large_for_the_device_runs_in_halves() -> None:
    runner = Small(room=4)
    with running(runner) as engine:
        rows = submit(engine, *[row(f"row {n}") for n in range(8)])
        assert [text(row) for row in rows] == [f"row {n}" for n in range(8)]
    assert runner.sizes == [8, 4, 4]


def test_what_a_failed_batch_held_is_free_when_it_runs_again() -> None:
    class Cache:
        """What a runner's frames hold."""

    class Full(Small):
        held: list[weakref.ref[Cache]] = []
        still_held = 0

        def answer(self, rows: Sequence[Row]) -> None:
            cache = Cache()
            self.still_held += sum(reference() is not None for reference in self.held)
            self.held.append(weakref.ref(cache))
            try:
                super().answer(rows)
            except OutOfMemory as error:
                raise OutOfMemory from error

    runner = Full(room=2)
    with running(runner) as engine:
        for one in submit(engine, *[row() for _ in range(8)]):
            one.output.result(SOON)
    assert len(runner.held) > 2
    assert not runner.still_held


def test_what_fits_is_remembered_in_beams() -> None:
    class Narrow(Recorder):
        def answer(self, rows: Sequence[Row]) -> None:
            if sum(row.sampling.num_beams for row in rows) > 8:
                raise OutOfMemory
            super().answer(rows)

    runner = Narrow()
    with running(runner, Limits(rows=16, tokens=10_000)) as engine:
        for one in submit(engine, row(beams=8), row(beams=8)):
            one.output.result(SOON)
        for one in submit(engine, *[row() for _ in range(8)]):
            one.output.result(SOON)
    assert runner.sizes == [2, 1, 1, 8]


def test_the_engine_remembers_what_fits() -> None:
    runner = Small(room=2)
    with running(runner) as engine:
        for _ in range(2):
            for one in submit(engine, *[row() for _ in range(8)]):
                one.output.result(SOON)
    assert runner.sizes[0] == 8
    assert runner.sizes[-4:] == [2, 2, 2, 2]


@pytest.mark.parametrize("is_continuous", [False, True])
def test_memory_that_was_short_once_makes_batches_small_for_a_while_only(is_continuous: bool) -> None:
    class ShortOnce(Joinable if is_continuous else Recorder):  # type: ignore[misc]
        def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
            if len(self.batches) == 0 and len(rows) > 1:
                self.batches.append([])
                raise OutOfMemory
            super().run(rows, heartbeat, admit)

    with running(ShortOnce()) as engine:
        for one in submit(engine, *[row(wanted=1) for _ in range(8)]):
            one.output.result(SOON)
        assert engine.limits.rows == 4
        for _ in range(40):
            for one in submit(engine, *[row(wanted=1) for _ in range(16)]):
                one.output.result(SOON)
        assert engine.limits.rows == 8


def test_a_row_too_large_for_the_device_alone_is_out_of_memory() -> None:
    with running(Small(room=4)) as engine:
        with pytest.raises(OutOfMemory):
            text(*submit(engine, row("huge")))
        assert text(*submit(engine, row("next"))) == "next"


def test_a_row_that_never_fits_does_not_make_later_batches_small_for_ever() -> None:
    runner = Small(room=8)
    with running(runner) as engine:
        rows = submit(engine, row("huge"), *[row() for _ in range(7)])
        with pytest.raises(OutOfMemory):
            text(rows[0])
        for _ in range(8):
            for one in submit(engine, *[row("later") for _ in range(8)]):
                one.output.result(SOON)
    assert max(len(batch) for batch in runner.batches if "later" in batch) > 1


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
    with running(FakeModel(step_s=0.01)) as engine:
        (one,) = submit(engine, row("a" * 100, wanted=100))
        time.sleep(0.05)
        engine.cancel(one)
        started = time.monotonic()
        submit(engine, row("next", wanted=1))[0].output.result(SOON)
        assert time.monotonic() - started < 0.5


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


def test_each_step_is_a_sign_of_life() -> None:
    beats: list[float] = []
    with running(FakeModel(), heartbeat=lambda: beats.append(time.monotonic())) as engine:
        engine.submit(row("a" * 100, wanted=100)).result(SOON)
        assert len(beats) >= 100


def test_an_idle_engine_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.engine.IDLE_HEARTBEAT_S", 0.01)
    beats: list[float] = []
    with running(FakeModel(), heartbeat=lambda: beats.append(time.monotonic())):
        time.sleep(0.1)
    assert len(beats) >= 3


def test_a_runner_that_hangs_gives_none() -> None:
    gate, beats = Gate(), []
    with running(gate, heartbeat=lambda: beats.append(time.monotonic())) as engine:
        submit(engine, row())
        assert gate.entered.wait(SOON)
        before = len(beats)
        time.sleep(0.05)
        assert len(beats) == before
        gate.opened.set()


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


def test_nobody_joins_a_batch_that_does_not_ask() -> None:
    gate = Gate()
    with running(gate) as engine:
        submit(engine, row())
        assert gate.entered.wait(SOON)
        assert engine.throughput.capacity == 1
        eventually(lambda: 0.05 < engine.throughput.closed_s < SOON)
        gate.opened.set()
        eventually(lambda: engine.throughput.closed_s == 0)


def test_a_batch_that_asks_has_room_for_others() -> None:
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
