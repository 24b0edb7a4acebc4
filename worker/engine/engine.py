"""The engine thread: forms batches of waiting rows, runs them with the runner, and resolves every row."""

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
from worker.engine.row import Output, Row
from worker.engine.scheduler import Limits, next_batch, should_wait
from worker.engine.throughput import Throughput, ThroughputMeter

logger = logging.getLogger(__name__)

#: An idle engine starts after this many seconds without a new row. Jobs that are sent together arrive within it.
ARRIVAL_GAP_S = 0.003
#: Maximum seconds that an idle engine waits for more rows.
BATCHING_WINDOW_S = 0.02
#: Maximum seconds after the last join that a running batch waits for rows whose pictures are being encoded.
JOIN_WAIT_S = 0.2
#: Maximum seconds that an engine without rows encodes pictures at a time.
HELP_S = 0.1
#: For this many seconds after the last join, waiting rows join only in groups (see scheduler.JOINING_PART).
GROUP_WAIT_S = 1.0
#: Seconds between two heartbeats of an idle engine.
IDLE_HEARTBEAT_S = 1.0
#: A row is withdrawn for an idle worker only after this many seconds: moving a row that starts soon does not pay.
WITHDRAWN_AFTER_S = 0.5


class Engine:
    """Runs rows from any thread. Each row gets an output or an error."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        heartbeat: SendHeartbeat = lambda: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`prepare` is called first in the engine thread."""
        self._runner = runner
        self._ceiling = Ceiling(limits.rows)
        self._max_tokens = limits.tokens
        self._heartbeat = heartbeat
        self._prepare = prepare
        self._meter = ThroughputMeter(limits.rows)
        self._waiting: list[Row] = []
        self._changed = threading.Condition()
        #: Rows whose pictures are being encoded.
        self._encoding: dict[Row, None] = {}
        self._joined_at = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def limits(self) -> Limits:
        """Current limits: the configured ones, with fewer rows after memory was short."""
        return Limits(self._ceiling.rows, self._max_tokens)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current batch. Waiting rows fail with Internal."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        for row in self._waiting:
            row.fail(_stopped())

    def submit(self, row: Row) -> Future[Output]:
        """Queue a row and return its output. Its pictures are encoded first, while other rows run."""
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
                # It was withdrawn meanwhile.
                return
            del self._encoding[row]
            if self._stopping:
                row.fail(_stopped())
            else:
                self._waiting.append(row)
            self._changed.notify()

    def cancel(self, row: Row) -> None:
        """End a row at the next step, waiting or running. The finish reason of its output is then `canceled`."""
        row.canceled = True
        with self._changed:
            self._changed.notify()

    @property
    def throughput(self) -> Throughput:
        """What the engine runs, and how fast. Thread-safe."""
        return self._meter.throughput

    def withdraw(self, rows: Sequence[Row], max_count: int) -> list[Row]:
        """Remove and return up to `max_count` of these rows that have not started in WITHDRAWN_AFTER_S seconds.

        The least urgent rows go first, the latest of them before the others. The caller must fail them.
        """
        since = time.monotonic() - WITHDRAWN_AFTER_S
        with self._changed:
            unstarted = {*self._waiting, *self._encoding}
            late = [row for row in rows if row in unstarted and row.arrived < since and not row.canceled]
            withdrawn = sorted(late, key=lambda row: (row.priority, row.arrived), reverse=True)[:max_count]
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
        """Wait for rows, help the encoder meanwhile, and take the rows of the next batch."""
        if self._waiting or not self._runner.help(HELP_S):
            with self._changed:
                if not self._waiting:
                    self._changed.wait(IDLE_HEARTBEAT_S)
                    self._await_batching_window()
        return self._take(())

    def _take(self, running: Sequence[Row]) -> list[Row]:
        """Remove and return the waiting rows that start now, beside the running ones."""
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
        """Wait while more rows keep arriving. The caller must hold the lock."""
        end = time.monotonic() + BATCHING_WINDOW_S
        while 0 < len(self._waiting) < self.limits.rows and time.monotonic() < end:
            if not self._changed.wait(ARRIVAL_GAP_S):
                return

    def _await_encoding(self, running: int) -> None:
        """Let a batch that is far from full wait for rows whose pictures are being encoded."""
        with self._changed:
            end = self._joined_at + JOIN_WAIT_S
            while time.monotonic() < end and should_wait(running, len(self._waiting), len(self._encoding), self.limits):
                self._changed.wait(max(0.0, end - time.monotonic()))

    def _run(self, first: Sequence[Row], *, joinable: bool = True) -> None:
        """Run a batch and the rows that join it until each is done."""
        batch, widest = list(first), _beams(first)
        # The runner supports joining only if it calls `admit`.
        self._meter.is_joinable = False
        self._update_throughput(batch, free=0)
        self._joined_at = time.monotonic()

        def admit(running: Sequence[Row]) -> Sequence[Row]:
            self._meter.is_joinable = joinable
            nonlocal widest
            if joinable:
                self._await_encoding(len(running))
            # Without a running row the next one starts a new run, since it may need beam search.
            joining = self._take(running) if joinable and running and not self._stopping else []
            if joining:
                self._joined_at = time.monotonic()
                self._ceiling.ran_well(widest)
                widest = _beams([*running, *joining])
            # Finished rows need no recovery, and would keep their pictures in memory.
            batch[:] = [*running, *joining]
            self._update_throughput(batch, free=self._free_rows(batch) if joinable else 0)
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

    def _update_throughput(self, batch: Sequence[Row], free: int) -> None:
        self._meter.update(batch, free, others_wait=bool(self._waiting))

    def _free_rows(self, batch: Sequence[Row]) -> int:
        """Number of new rows that could join a batch at once: 0 while others wait, since those come first."""
        return 0 if self._waiting else max(0, self.limits.rows - _beams(batch))

    def _recover(self, batch: Sequence[Row], unfinished: list[Row], error: Exception) -> None:
        """Run the unfinished rows of a failed batch again in halves. A row that failed alone gets the error."""
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
                # If rows joined, the row that causes the error would never run alone.
                self._run(part, joinable=False)
        if any(isinstance(row.output.exception(), OutOfMemory) for row in unfinished):
            self._ceiling.restore(fitted)


def _beams(rows: Sequence[Row]) -> int:
    """Number of rows, each counted once for each of its beams."""
    return sum(row.sampling.num_beams for row in rows)


def _clear_frames(error: BaseException | None) -> None:
    """Free the objects in the frames of an error's tracebacks: after a lack of memory the next try needs it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _stopped() -> Internal:
    return Internal("The worker stopped before this job ran: send it again.")


def _abort(row: Row) -> None:
    """End a row that was canceled or passed its deadline before it started."""
    if row.canceled:
        row.finish(Output(ids=(), finish_reason="canceled"))
    else:
        row.fail(DeadlineExceeded("The job's deadline passed before it started: add workers or allow more time."))
