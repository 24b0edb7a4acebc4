"""The rows that wait for the engine: their pictures are being encoded, or they are ready to run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tasks.errors import DeadlineExceeded, Internal
from worker.engine.row import Output, Row, urgency
from worker.engine.scheduler import Limits, next_batch, should_wait

#: An idle engine starts after this many seconds without a new row. Jobs that are sent together arrive within it.
ARRIVAL_GAP_S = 0.003
#: Maximum seconds that an idle engine waits for more rows.
BATCHING_WINDOW_S = 0.02
#: A row is withdrawn for an idle worker only after this many seconds: moving a row that starts soon does not pay.
WITHDRAWN_AFTER_S = 0.5


class JoinableBatch(NamedTuple):
    """A batch of `running` rows, and how long it may wait for more: until time.monotonic() `encoded_until` for rows
    whose pictures are being encoded, and until `decoded_until` for those whose pictures are being decoded."""

    running: int
    limits: Limits
    encoded_until: float
    decoded_until: float


class RowQueue:
    """Waiting rows. Any thread may add, cancel and withdraw them; the engine thread waits for them and takes them."""

    def __init__(self) -> None:
        self._ready: list[Row] = []
        #: Rows whose pictures are being encoded.
        self._encoding: dict[Row, None] = {}
        #: Number of rows whose pictures are being decoded.
        self._expected = 0
        self._changed = threading.Condition()
        self._is_closed = False

    @property
    def is_empty(self) -> bool:
        """Whether no row is ready to run."""
        return not self._ready

    @property
    def is_idle(self) -> bool:
        """Whether no row is ready to run, and none is expected soon."""
        return not (self._ready or self._encoding or self._expected)

    def __len__(self) -> int:
        """Number of waiting rows."""
        return len(self._ready) + len(self._encoding)

    def add(self, row: Row) -> None:
        """Add a row whose pictures are still to be encoded."""
        with self._changed:
            self._encoding[row] = None

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Count a row whose pictures are being decoded, while the block runs."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify()

    def mark_ready(self, row: Row, cached_images: int = 0) -> None:
        """Make an added row ready to run, unless it was withdrawn. `cached_images`: see Row."""
        row.cached_images = cached_images
        row.ready = time.monotonic()
        with self._changed:
            if row not in self._encoding:
                return
            del self._encoding[row]
            if self._is_closed:
                row.fail(_stopped())
            else:
                self._ready.append(row)
            self._changed.notify()

    def wake(self) -> None:
        """Wake the engine thread, so that it takes rows again."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Fail rows that become ready from now on, and wake the engine thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def fail_all(self) -> None:
        """Fail the ready rows. Call this when the engine thread has ended."""
        for row in self._ready:
            row.fail(_stopped())

    def withdraw(self, rows: Sequence[Row], max_count: int) -> list[Row]:
        """See Engine.withdraw."""
        since = time.monotonic() - WITHDRAWN_AFTER_S
        with self._changed:
            unstarted = {*self._ready, *self._encoding}
            late = [row for row in rows if row in unstarted and row.arrived < since and not row.is_canceled]
            withdrawn = sorted(late, key=urgency, reverse=True)[:max_count]
            self._remove(withdrawn)
            for row in withdrawn:
                self._encoding.pop(row, None)
        return withdrawn

    def take(self, limits: Limits, running: Sequence[Row], *, in_groups: bool) -> list[Row]:
        """Remove and return the rows that start now, beside the running ones: see scheduler.next_batch.

        Ends ready rows that were canceled or passed their deadline.
        """
        if not self._ready:
            return []
        now = time.monotonic()
        with self._changed:
            if running or len(self._ready) > 1:
                self._give_way()
            aborted = [row for row in self._ready if row.abort_reason(now)]
            self._remove(aborted)
            batch = next_batch(self._ready, limits, running, in_groups=in_groups)
            self._remove(batch)
        for row in aborted:
            _abort(row)
        for row in batch:
            row.started = row.started or now
        return batch

    def await_rows(self, max_rows: int, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for a row, then while more rows keep arriving, up to `max_rows`."""
        with self._changed:
            if self._ready or self._is_closed:
                return
            self._changed.wait(timeout_s)
            end = time.monotonic() + BATCHING_WINDOW_S
            while 0 < len(self._ready) < max_rows and time.monotonic() < end:
                if not self._changed.wait(ARRIVAL_GAP_S):
                    return

    def should_await_joining(self, batch: JoinableBatch) -> bool:
        """Whether a batch that is far from full should wait for more rows now: see scheduler.should_wait."""
        with self._changed:
            return self._should_await_joining(batch, time.monotonic())

    def await_change(self, batch: JoinableBatch) -> None:
        """Wait until the waiting rows change or a time of the batch is over, if it should still wait for more."""
        with self._changed:
            now = time.monotonic()
            if self._should_await_joining(batch, now):
                ends = batch.encoded_until, batch.decoded_until
                self._changed.wait(min(end - now for end in ends if end > now))

    def _should_await_joining(self, batch: JoinableBatch, now: float) -> bool:
        coming = len(self._encoding) if now < batch.encoded_until else 0
        coming += self._expected if now < batch.decoded_until else 0
        return should_wait(batch.running, len(self._ready), coming, batch.limits)

    def _give_way(self) -> None:
        """Cancel ready rows that give way to others. The caller must hold the lock."""
        for row in self._ready:
            row.canceled |= row.gives_way

    def _remove(self, rows: Sequence[Row]) -> None:
        """Remove ready rows. The caller must hold the lock."""
        removed = set(rows)
        self._ready = [row for row in self._ready if row not in removed]


def _stopped() -> Internal:
    return Internal("The worker stopped before this job ran: send it again.")


def _abort(row: Row) -> None:
    """End a row that was canceled or passed its deadline before it started."""
    if row.is_canceled:
        row.finish(Output(ids=(), finish_reason="canceled"))
    else:
        row.fail(DeadlineExceeded("The job's deadline passed before it started: add workers or allow more time."))
