"""The engine's thread: takes the rows that wait, has the runner run them, and resolves every one."""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from tasks.errors import DeadlineExceeded, Internal, JobError, OutOfMemory
from worker.engine.ceiling import Ceiling
from worker.engine.interfaces import Beat, Runner
from worker.engine.row import Output, Row
from worker.engine.scheduler import Limits, next_batch, worth_waiting

logger = logging.getLogger(__name__)

#: Seconds without a newcomer after which an idle engine starts: jobs sent together arrive within it.
LINGER_S = 0.003
#: Seconds that it waits so in all.
MAX_LINGER_S = 0.02
#: Seconds that a running batch may be held up, between two joinings, for rows that come soon.
PATIENCE_S = 0.2
#: Seconds that an engine with nothing to run may encode pictures at a time.
CATCH_UP_S = 0.1
#: Seconds after the last joining in which rows that wait join in groups only (see scheduler.JOINING_PART).
GROUP_PATIENCE_S = 1.0
#: Seconds between two signs of life while there is nothing to do.
IDLE_BEAT_S = 1.0
#: Seconds that a row has waited before it is withdrawn for an idle worker: one that begins soon is not worth the way.
WITHDRAWN_AFTER_S = 0.5
#: The weight of the newest in averages of the pace, and seconds after the last row in which half of it is forgotten.
NEWEST_PART, FORGOTTEN_S = 0.1, 5.0


class Pace(NamedTuple):
    """What an engine runs, and how fast."""

    #: Rows that the model runs now or could begin at once. What is beyond waits for the end of others.
    capacity: int
    #: Rows that run at once while others wait.
    width: float
    #: Seconds that a row takes once it has begun; 0 where none has.
    job_s: float
    #: Seconds that a batch which none may join still takes.
    closed_s: float = 0.0


class Engine:
    """Submit rows from any thread; each gets a result or an error."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        beat: Beat = lambda: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`prepare` is called in the engine's thread, before all else."""
        self._runner = runner
        self._ceiling = Ceiling(limits.rows)
        self._most_tokens = limits.tokens
        self._beat = beat
        self._prepare = prepare
        self._waiting: list[Row] = []
        self._changed = threading.Condition()
        #: Rows whose pictures are being encoded.
        self._coming: dict[Row, None] = {}
        self._running: Sequence[Row] = ()
        self._width = float(limits.rows)
        #: Seconds that a row took, of late, and when the last one ended.
        self._usual_s = 0.0
        self._ended_at = float("-inf")
        #: Whether the runner asks for rows that join those.
        self._is_joined = False
        #: Rows more that could begin at once.
        self._free = limits.rows
        self._joined_at = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def _limits(self) -> Limits:
        return Limits(self._ceiling.rows, self._most_tokens)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it runs; what waits fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        for row in self._waiting:
            row.fail(_stopped())

    def submit(self, row: Row) -> Future[Output]:
        """A row's output. Its images are encoded first, while others run."""
        with self._changed:
            self._coming[row] = None
        if row.tokens.pictures:
            self._runner.look(row.tokens.pictures, functools.partial(self._has_come, row))
        else:
            self._has_come(row)
        return row.output

    def _has_come(self, row: Row, cached_images: int = 0) -> None:
        row.cached_images = cached_images
        with self._changed:
            if row not in self._coming:
                # Withdrawn meanwhile.
                return
            del self._coming[row]
            if self._stopping:
                row.fail(_stopped())
            else:
                self._waiting.append(row)
            self._changed.notify()

    def cancel(self, row: Row) -> None:
        """End a row at the next step, wherever it is. Its output then says `canceled`."""
        row.canceled = True
        with self._changed:
            self._changed.notify()

    @property
    def pace(self) -> Pace:
        """Safe in any thread."""
        running, now = self._running, time.monotonic()
        age_s = now - sum(row.started for row in running) / len(running) if running else 0.0
        # Of long ago it says little: other jobs come.
        usual_s = self._usual_s * 2 ** ((self._ended_at - now) / FORGOTTEN_S)
        left_s = usual_s - age_s if usual_s > age_s else age_s
        closed_s = 0.0 if self._is_joined or not running else left_s
        return Pace(len(running) + self._free, self._width, max(usual_s, age_s), closed_s)

    def withdraw(self, rows: Sequence[Row], most: int) -> list[Row]:
        """Take those of these rows out that have waited for long and not begun, the least urgent and latest first.

        The caller fails them.
        """
        since = time.monotonic() - WITHDRAWN_AFTER_S
        with self._changed:
            unbegun = {*self._waiting, *self._coming}
            late = [row for row in rows if row in unbegun and row.arrived < since and not row.canceled]
            withdrawn = sorted(late, key=lambda row: (row.priority, row.arrived), reverse=True)[:most]
            taken = set(withdrawn)
            self._waiting = [row for row in self._waiting if row not in taken]
            for row in withdrawn:
                self._coming.pop(row, None)
        return withdrawn

    def _loop(self) -> None:
        self._prepare()
        while not self._stopping:
            self._beat()
            batch = self._take()
            if batch:
                self._run(batch)
                self._rest()

    def _take(self) -> list[Row]:
        if self._waiting or not self._runner.catch_up(CATCH_UP_S):
            with self._changed:
                if not self._waiting:
                    self._changed.wait(IDLE_BEAT_S)
                    self._linger()
        return self._start(())

    def _start(self, running: Sequence[Row]) -> list[Row]:
        """Take the rows that are to run now out of those that wait."""
        if not self._waiting:
            return []
        now = time.monotonic()
        with self._changed:
            for row in [row for row in self._waiting if row.interruption(now)]:
                self._waiting.remove(row)
                _drop(row)
            is_late = now >= self._joined_at + GROUP_PATIENCE_S
            batch = next_batch(self._waiting, self._limits, running, in_groups=not is_late)
            taken = set(map(id, batch))
            self._waiting = [row for row in self._waiting if id(row) not in taken]
        for row in batch:
            row.started = row.started or now
        return batch

    def _linger(self) -> None:
        end = time.monotonic() + MAX_LINGER_S
        while 0 < len(self._waiting) < self._limits.rows and time.monotonic() < end:
            if not self._changed.wait(LINGER_S):
                return

    def _gather(self, running: int) -> None:
        """Let rows that come soon catch up with a batch that is far from full."""
        with self._changed:
            end = self._joined_at + PATIENCE_S
            while time.monotonic() < end and worth_waiting(
                running, len(self._waiting), len(self._coming), self._limits
            ):
                self._changed.wait(max(0.0, end - time.monotonic()))

    def _run(self, first: Sequence[Row], *, joinable: bool = True) -> None:
        batch, most = list(first), _beams(first)
        # Whether others may join shows when the runner asks for them.
        self._is_joined = False
        self._count(batch, free=0)
        self._joined_at = time.monotonic()

        def newcomers(running: Sequence[Row]) -> Sequence[Row]:
            self._is_joined = joinable
            nonlocal most
            if joinable:
                self._gather(len(running))
            # Where nobody runs any more, whoever is first begins a batch of another run: it may be one of beams.
            joining = self._start(running) if joinable and running and not self._stopping else []
            if joining:
                self._joined_at = time.monotonic()
                self._ceiling.ran_well(most)
                most = _beams([*running, *joining])
            # Rows that are over need no recovery, and hold their pictures.
            batch[:] = [*running, *joining]
            self._count(batch, free=self._free_rows(batch) if joinable else 0)
            return joining

        error: Exception = Internal("The model left this job without an answer: report it.")
        try:
            self._runner.run(first, self._beat, newcomers)
            if joinable:
                self._ceiling.ran_well(most)
        except Exception as caught:
            error = caught
            _let_go(error)
        unfinished = [row for row in batch if not row.is_done]
        if unfinished:
            self._recover(batch, unfinished, error)

    def _count(self, batch: Sequence[Row], free: int) -> None:
        known = set(batch)
        for row in self._running:
            if row not in known:
                self._has_ended(row)
        self._running, self._free = tuple(batch), free
        if self._waiting:
            self._width += (len(batch) - self._width) * NEWEST_PART
        else:
            self._width = max(self._width, len(batch))

    def _has_ended(self, row: Row) -> None:
        now = time.monotonic()
        forgotten = 1 - 2 ** ((self._ended_at - now) / FORGOTTEN_S)
        self._usual_s += (now - row.started - self._usual_s) * max(NEWEST_PART, forgotten)
        self._ended_at = now

    def _rest(self) -> None:
        for row in self._running:
            self._has_ended(row)
        self._running, self._free = (), self._limits.rows

    def _free_rows(self, batch: Sequence[Row]) -> int:
        """Whoever waits now could not join, and a row that came would wait behind it."""
        return 0 if self._waiting else max(0, self._limits.rows - _beams(batch))

    def _recover(self, batch: Sequence[Row], unfinished: list[Row], error: Exception) -> None:
        if len(batch) == 1:
            logger.error("A job failed alone; its caller gets the error.", exc_info=error)
            unfinished[0].fail(error if isinstance(error, JobError) else Internal(type(error).__name__))
            return
        half = max(1, len(unfinished) // 2)
        fitted = self._ceiling.rows
        if isinstance(error, OutOfMemory):
            self._ceiling.lower(_beams(batch))
        logger.warning(
            "A batch of %d failed; its %d unfinished jobs run again in smaller ones.",
            len(batch), len(unfinished), exc_info=error,
        )  # fmt: skip
        for part in (unfinished[:half], unfinished[half:]):
            if part:
                # Newcomers would be suspects too, and the culprit never alone.
                self._run(part, joinable=False)
        if any(isinstance(row.output.exception(), OutOfMemory) for row in unfinished):
            self._ceiling.restore(fitted)


def _beams(rows: Sequence[Row]) -> int:
    return sum(row.sampling.num_beams for row in rows)


def _let_go(error: BaseException | None) -> None:
    """Free what the frames hold that an error came through: where memory was short, the next try needs it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _stopped() -> Internal:
    return Internal("The worker stopped before this job ran: send it again.")


def _drop(row: Row) -> None:
    if row.canceled:
        row.finish(Output(ids=(), finish_reason="canceled"))
    else:
        row.fail(DeadlineExceeded("The job's deadline passed before it started: add workers or allow more time."))
