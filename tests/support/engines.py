"""A running engine, and runners that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from worker.engine.engine import Engine
from worker.engine.interfaces import Admit, Runner, SendHeartbeat
from worker.engine.row import Output, Picture, Row
from worker.engine.scheduler import Limits

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


class Joinable(Recorder):
    """Rows join at each step; each ends after as many steps as it wants. A step with a row called `poison` fails."""

    def __init__(self, step_s: float = 0.0, prefill_steps: int = 0) -> None:
        """`prefill_steps`: the steps of a row before it has a token."""
        super().__init__()
        self._step_s = step_s
        self._prefill_steps = prefill_steps

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
                if steps[one] > self._prefill_steps:
                    one.first_token = one.first_token or time.monotonic()
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
