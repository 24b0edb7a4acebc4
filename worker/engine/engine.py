"""The engine's thread: forms batches of the rows that wait, has the runner run them, and resolves every row."""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from tasks.errors import DeadlineExceeded, Internal, JobError, OutOfMemory
from worker.engine.ceiling import Ceiling
from worker.engine.interfaces import Runner, SendHeartbeat
from worker.engine.pace import Pace, PaceMeter
from worker.engine.row import Output, Row
from worker.engine.scheduler import Limits, next_batch, should_wait

logger = logging.getLogger(__name__)

#: Seconds without a new row after which an idle engine starts: jobs sent together arrive within it.
ARRIVAL_GAP_S = 0.003
#: Seconds that an idle engine waits for more rows at most.
BATCHING_WINDOW_S = 0.02
#: Seconds that a running batch may be held up, after the last row joined, for rows whose pictures are being encoded.
JOIN_WAIT_S = 0.2
#: Seconds that an engine with nothing to run may encode pictures at a time.
HELP_S = 0.1
#: Seconds after the last joining in which rows that wait join in groups only (see scheduler.JOINING_PART).
GROUP_WAIT_S = 1.0
#: Seconds between two heartbeats while there is nothing to do.
IDLE_HEARTBEAT_S = 1.0
#: Seconds that a row has waited before it is withdrawn for an idle worker: one that starts soon is not worth the move.
WITHDRAWN_AFTER_S = 0.5


class Engine:
    """Runs rows that any thread submits; each gets an output or an error."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        heartbeat: SendHeartbeat = lambda: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`prepare` is called in the engine's thread, before all else."""
        self._runner = runner
        self._ceiling = Ceiling(limits.rows)
        self._max_tokens = limits.tokens
        self._heartbeat = heartbeat
        self._prepare = prepare
        self._meter = PaceMeter(limits.rows)
        self._waiting: list[Row] = []
        self._changed = threading.Condition()
        #: Rows whose pictures are being encoded.
        self._encoding: dict[Row, None] = {}
        self._joined_at = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def limits(self) -> Limits:
        """What may run at once now: fewer rows than at first where memory was short."""
        return Limits(self._ceiling.rows, self._max_tokens)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it runs. Rows that wait fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        for row in self._waiting:
            row.fail(_stopped())

    def submit(self, row: Row) -> Future[Output]:
        """A row's output. Its pictures are encoded first, while others run."""
        with self._changed:
            self._encoding[row] = None
        if row.tokens.pictures:
            self._runner.prefetch(row.tokens.pictures, functools.partial(self._enqueue, row))
        else:
            self._enqueue(row)
        return row.output

    def _enqueue(self, row: Row, cached_images: int = 0) -> None:
        row.cached_images = cached_images
        with self._changed:
            if row not in self._encoding:
                # Withdrawn meanwhile.
                return
            del self._encoding[row]
            if self._stopping:
                row.fail(_stopped())
            else:
                self._waiting.append(row)
            self._changed.notify()

    def cancel(self, row: Row) -> None:
        """End a row at the next step, wherever it is. The finish reason of its output is then `canceled`."""
        row.canceled = True
        with self._changed:
            self._changed.notify()

    @property
    def pace(self) -> Pace:
        """What runs, and how fast. Safe in any thread."""
        return self._meter.pace

    def withdraw(self, rows: Sequence[Row], most: int) -> list[Row]:
        """Remove up to `most` of these rows that have waited for WITHDRAWN_AFTER_S and not started.

        The least urgent and latest go first. The caller fails them.
        """
        since = time.monotonic() - WITHDRAWN_AFTER_S
        with self._changed:
            unstarted = {*self._waiting, *self._encoding}
            late = [row for row in rows if row in unstarted and row.arrived < since and not row.canceled]
            withdrawn = sorted(late, key=lambda row: (row.priority, row.arrived), reverse=True)[:most]
            taken = set(withdrawn)
            self._waiting = [row for row in self._waiting if row not in taken]
            for row in withdrawn:
                self._encoding.pop(row, None)
        return withdrawn

    def _loop(self) -> None:
        self._prepare()
        while not self._stopping:
            self._heartbeat()
            batch = self._first_batch()
            if batch:
                self._run(batch)
                self._meter.idle(self.limits.rows)

    def _first_batch(self) -> list[Row]:
        """Wait for rows, helping the encoder meanwhile, and take those that are to run."""
        if self._waiting or not self._runner.help(HELP_S):
            with self._changed:
                if not self._waiting:
                    self._changed.wait(IDLE_HEARTBEAT_S)
                    self._await_batching_window()
        return self._take(())

    def _take(self, running: Sequence[Row]) -> list[Row]:
        """Take the rows that are to start now, beside those that run, out of those that wait."""
        if not self._waiting:
            return []
        now = time.monotonic()
        with self._changed:
            for row in [row for row in self._waiting if row.abort_reason(now)]:
                self._waiting.remove(row)
                _abort(row)
            in_groups = now < self._joined_at + GROUP_WAIT_S
            batch = next_batch(self._waiting, self.limits, running, in_groups=in_groups)
            taken = set(map(id, batch))
            self._waiting = [row for row in self._waiting if id(row) not in taken]
        for row in batch:
            row.started = row.started or now
        return batch

    def _await_batching_window(self) -> None:
        """Wait for more rows as long as they keep arriving. The caller holds the lock."""
        end = time.monotonic() + BATCHING_WINDOW_S
        while 0 < len(self._waiting) < self.limits.rows and time.monotonic() < end:
            if not self._changed.wait(ARRIVAL_GAP_S):
                return

    def _await_encoding(self, running: int) -> None:
        """Hold a batch that is far from full up for rows whose pictures are being encoded."""
        with self._changed:
            end = self._joined_at + JOIN_WAIT_S
            while time.monotonic() < end and should_wait(running, len(self._waiting), len(self._encoding), self.limits):
                self._changed.wait(max(0.0, end - time.monotonic()))

    def _run(self, first: Sequence[Row], *, joinable: bool = True) -> None:
        """Run a batch, with the rows that join it, until each is done."""
        batch, widest = list(first), _beams(first)
        # Whether others may join shows when the runner asks for them.
        self._meter.is_joinable = False
        self._update_pace(batch, free=0)
        self._joined_at = time.monotonic()

        def admit(running: Sequence[Row]) -> Sequence[Row]:
            self._meter.is_joinable = joinable
            nonlocal widest
            if joinable:
                self._await_encoding(len(running))
            # If no row runs any more, the next one starts a run of its own: it may be one of beams.
            joining = self._take(running) if joinable and running and not self._stopping else []
            if joining:
                self._joined_at = time.monotonic()
                self._ceiling.ran_well(widest)
                widest = _beams([*running, *joining])
            # Rows that are done need no recovery, and hold their pictures.
            batch[:] = [*running, *joining]
            self._update_pace(batch, free=self._free_rows(batch) if joinable else 0)
            return joining

        error: Exception = Internal("The model left this job without an answer: report it.")
        try:
            self._runner.run(first, self._heartbeat, admit)
            if joinable:
                self._ceiling.ran_well(widest)
        except Exception as caught:
            error = caught
            _clear_frames(error)
        unfinished = [row for row in batch if not row.is_done]
        if unfinished:
            self._recover(batch, unfinished, error)

    def _update_pace(self, batch: Sequence[Row], free: int) -> None:
        self._meter.update(batch, free, others_wait=bool(self._waiting))

    def _free_rows(self, batch: Sequence[Row]) -> int:
        """Rows that could join a batch at once: none while others wait, since these could not join and come first."""
        return 0 if self._waiting else max(0, self.limits.rows - _beams(batch))

    def _recover(self, batch: Sequence[Row], unfinished: list[Row], error: Exception) -> None:
        """Run the unfinished rows of a failed batch again in halves; a row that failed alone gets the error."""
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
                # Rows that join would be suspects too, and the culprit would never run alone.
                self._run(part, joinable=False)
        if any(isinstance(row.output.exception(), OutOfMemory) for row in unfinished):
            self._ceiling.restore(fitted)


def _beams(rows: Sequence[Row]) -> int:
    """Rows counted in beams."""
    return sum(row.sampling.num_beams for row in rows)


def _clear_frames(error: BaseException | None) -> None:
    """Free what the frames of an error's tracebacks hold: where memory was short, the next try needs it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _stopped() -> Internal:
    return Internal("The worker stopped before this job ran: send it again.")


def _abort(row: Row) -> None:
    """End a row that was canceled, or whose deadline has passed, before it started."""
    if row.canceled:
        row.finish(Output(ids=(), finish_reason="canceled"))
    else:
        row.fail(DeadlineExceeded("The job's deadline passed before it started: add workers or allow more time."))
