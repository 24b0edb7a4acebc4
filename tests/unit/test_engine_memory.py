"""Batches that do not fit into memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest

from tasks.errors import OutOfMemory
from tests.support.engines import SOON, Joinable, Recorder, name, running, submit, text
from tests.support.rows import row
from worker.engine.interfaces import Admit, SendHeartbeat
from worker.engine.row import Row
from worker.engine.scheduler import Limits


class Small(Recorder):
    """A device with room for so many rows, and for none called `huge`."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def answer(self, rows: Sequence[Row]) -> None:
        if len(rows) > self._room or "huge" in map(name, rows):
            raise OutOfMemory
        super().answer(rows)


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


def test_the_ceiling_counts_beams() -> None:
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


def test_the_engine_remembers_how_many_rows_fit() -> None:
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
