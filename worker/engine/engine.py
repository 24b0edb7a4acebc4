"""The engine thread: forms batches of waiting rows, runs them with the runner, and resolves every row."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

from tasks.errors import Internal, JobError, OutOfMemory
from worker.engine.ceiling import Ceiling
from worker.engine.device_errors import is_device_lost
from worker.engine.interfaces import Runner, SendHeartbeat
from worker.engine.row import Output, Row
from worker.engine.row_queue import JoinableBatch, RowQueue
from worker.engine.scheduler import Limits
from worker.engine.throughput import Throughput, ThroughputMeter
from worker.observability.metrics import MAX_ROWS, PHASES, REQUESTS_RUNNING, REQUESTS_WAITING

logger = logging.getLogger(__name__)

#: Maximum seconds after the last join that a running batch waits for rows whose pictures are being encoded.
JOIN_WAIT_S = 0.2
#: For rows whose pictures are being decoded it waits as long as this many of its last steps: a step of a few rows takes
#: nearly as long as one of many, and the cores that it needs are those that decode.
DECODING_STEPS = 3
#: Maximum seconds that an engine without rows encodes pictures at a time.
HELP_S = 0.1
#: For this many seconds after the last join, waiting rows join only in groups (see scheduler.JOINING_PART).
GROUP_WAIT_S = 1.0
#: Seconds between two heartbeats of an idle engine.
IDLE_HEARTBEAT_S = 1.0


class Engine:
    """Runs rows from any thread. Each row gets an output or an error."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        heartbeat: SendHeartbeat = lambda: None,
        prepare: Callable[[], None] = lambda: None,
        on_device_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`prepare` is called first in the engine thread. `on_device_lost` is called there with an error after which no
        batch would succeed in this process."""
        self._runner = runner
        self._ceiling = Ceiling(limits.rows)
        self._limits = limits
        self._heartbeat = heartbeat
        self._prepare = prepare
        self._on_device_lost = on_device_lost
        self._meter = ThroughputMeter(limits.rows)
        self._queue = RowQueue()
        self._joined_at = 0.0
        #: time.monotonic() at which the last step began.
        self._stepped_at = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def limits(self) -> Limits:
        """Current limits: the configured ones, with fewer rows after memory was short."""
        return dataclasses.replace(self._limits, rows=self._ceiling.rows)

    def start(self) -> None:
        """Start the thread."""
        REQUESTS_RUNNING.set_function(lambda: self._meter.running)
        REQUESTS_WAITING.set_function(self._queue.__len__)
        MAX_ROWS.set_function(lambda: self.limits.rows)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current batch. Waiting rows fail with Internal."""
        self._stopping = True
        self._queue.close()
        self._thread.join()
        self._queue.fail_all()

    def submit(self, row: Row) -> Future[Output]:
        """Queue a row and return its output. Its pictures are encoded first, while other rows run.

        Those of a row that runs alone are encoded when it does: not together with others.
        """
        self._queue.add(row)
        if row.tokens.pictures and not row.alone:
            self._runner.prefetch(row.tokens.pictures, functools.partial(self._queue.mark_ready, row))
            # An engine that waits may help to encode them.
            self._queue.wake()
        else:
            self._queue.mark_ready(row)
        return row.output

    def cancel(self, row: Row) -> None:
        """End a row at the next step, waiting or running. The finish reason of its output is then `canceled`."""
        row.canceled = True
        self._queue.wake()

    @property
    def running(self) -> int:
        """The number of running rows."""
        return self._meter.running

    @property
    def is_idle(self) -> bool:
        """Whether no row runs or waits, and none is expected soon. Thread-safe."""
        return not self._meter.running and self._queue.is_idle

    @property
    def throughput(self) -> Throughput:
        """What the engine runs, and how fast. Thread-safe."""
        return self._meter.throughput

    def expecting(self) -> AbstractContextManager[None]:
        """See RowQueue."""
        return self._queue.expecting()

    def withdraw(self, rows: Sequence[Row], max_count: int) -> list[Row]:
        """Remove and return up to `max_count` of these rows that have not started within some time.

        That time is row_queue.WITHDRAWN_AFTER_S. The least urgent rows go first, the latest of them before the others.
        The caller must fail them.
        """
        return self._queue.withdraw(rows, max_count)

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
        if not self._queue.is_empty or not self._runner.help(HELP_S):
            started = time.monotonic()
            self._queue.await_rows(self.limits.rows, IDLE_HEARTBEAT_S)
            PHASES["idle"].inc(time.monotonic() - started)
        return self._take(())

    def _take(self, running: Sequence[Row]) -> list[Row]:
        """Remove and return the waiting rows that start now, beside the running ones."""
        in_groups = time.monotonic() < self._joined_at + GROUP_WAIT_S
        return self._queue.take(self.limits, running, in_groups=in_groups)

    def _run(self, first: Sequence[Row], *, joinable: bool = True) -> None:
        """Run a batch and the rows that join it until each is done."""
        batch, widest, is_alone = list(first), _beams(first), first[0].alone
        # The runner supports joining only if it calls `admit`.
        self._meter.is_joinable = False
        self._update_throughput(batch, free=0)
        self._joined_at = self._stepped_at = time.monotonic()

        def admit(running: Sequence[Row]) -> Sequence[Row]:
            self._meter.is_joinable = joinable
            nonlocal widest
            # A chunk of a prompt takes as long in any company, so it does not wait.
            if joinable and running and not is_alone and all(row.is_prefilled for row in running):
                self._await_joining(len(running))
            # Without a running row the next one starts a new run, since it may be one that runs alone.
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
            self._runner.run(first, functools.partial(self._step, batch), admit)
            if joinable:
                self._ceiling.ran_well(widest)
        except Exception as caught:
            error = caught
            if is_device_lost(error):
                self._on_device_lost(error)
            _clear_frames(error)
        unfinished = [row for row in batch if not row.is_done]
        if unfinished:
            self._recover(batch, unfinished, error)

    def _step(self, batch: Sequence[Row]) -> None:
        """Called at each step of a running batch."""
        self._heartbeat()
        # Also for rows whose pictures are still to be encoded: it has ended by then.
        if batch and batch[0].gives_way and len(self._queue):
            batch[0].canceled = True

    def _await_joining(self, running: int) -> None:
        """Let a batch that is far from full wait for more rows, and help the encoder meanwhile."""
        now, encoded_until = time.monotonic(), self._joined_at + JOIN_WAIT_S
        decoded_until = now + DECODING_STEPS * min(now - self._stepped_at, JOIN_WAIT_S)
        batch = JoinableBatch(running, self.limits, encoded_until, decoded_until)
        while self._queue.should_await_joining(batch):
            now = time.monotonic()
            if not self._runner.help(min(HELP_S, encoded_until - now)):
                self._queue.await_change(batch)
                PHASES["idle"].inc(time.monotonic() - now)
        self._stepped_at = time.monotonic()

    def _update_throughput(self, batch: Sequence[Row], free: int) -> None:
        self._meter.update(batch, free, others_wait=not self._queue.is_empty)

    def _free_rows(self, batch: Sequence[Row]) -> int:
        """Number of new rows that could join a batch at once: 0 while others wait, since those come first."""
        return max(0, self.limits.rows - _beams(batch)) if self._queue.is_empty else 0

    def _recover(self, batch: Sequence[Row], unfinished: list[Row], error: Exception) -> None:
        """Run the unfinished rows of a failed batch again in halves. A row that failed alone gets the error."""
        if len(batch) == 1:
            unfinished[0].fail(error if isinstance(error, JobError) else _internal(error))
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


def _internal(error: Exception) -> Internal:
    """What a row that meets a defect ends with. Its job logs the cause (worker/jobs/task.py)."""
    internal = Internal(type(error).__name__)
    internal.__cause__ = error
    return internal


def _beams(rows: Sequence[Row]) -> int:
    """Number of rows, each counted once for each of its beams."""
    return sum(row.sampling.num_beams for row in rows)


def _clear_frames(error: BaseException | None) -> None:
    """Free the objects in the frames of an error's tracebacks: after a lack of memory the next try needs it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
