"""The runs of jobs that are under way, and their cancellation."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tasks.errors import DeadlineExceeded
from tasks.payloads import Job
from tasks.protocol import seconds_since
from tasks.results import Result
from worker.engine.row import Row
from worker.jobs.live_updates import NO_UPDATES, RunUpdates


class CancellationError(Exception):
    """The job was canceled while it ran. `partial` is its result so far."""

    def __init__(self, partial: Result | None = None) -> None:
        super().__init__("canceled")
        self.partial = partial


@dataclass(frozen=True, slots=True)
class JobContext:
    """A job's properties beside its payload."""

    id: str
    priority: int = 5
    #: Unix seconds.
    submitted_at: float | None = None
    #: Seconds from now after which the job ends with the text so far.
    soft_limit_s: float | None = None
    #: Runs before this one that ended with a temporary error.
    retries: int = 0
    #: Celery's name of the worker.
    worker: str | None = None
    #: Whether no other job may be in its batch, and nothing in a cache may be used.
    is_alone: bool = False


class Run:
    """One run of a job, as other threads see it."""

    def __init__(self, context: JobContext, deadline: float | None, updates: RunUpdates = NO_UPDATES) -> None:
        """`deadline`: time.monotonic() at which the job ends with the text so far. `updates`: for its watchers."""
        self.context = context
        self.updates = updates
        self.deadline = deadline
        #: None until its images are loaded.
        self.row: Row | None = None
        self.is_canceled = False
        self.queued_s = seconds_since(context.submitted_at)

    def check(self) -> None:
        """Raise CancellationError or DeadlineExceeded if the job must not go on."""
        if self.is_canceled:
            raise CancellationError
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded(
                "The job's deadline passed before its model could start: add workers or allow more time."
            )


class RunRegistry:
    """The runs under way by job id, and the ids of canceled jobs. Thread-safe."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._canceled: set[str] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Register a run during the block. It is canceled at once if its job is."""
        id = run.context.id
        with self._lock:
            self._runs[id] = run
            run.is_canceled = id in self._canceled
        try:
            yield
        finally:
            with self._lock:
                # Another job with this id may have begun since this one passed its limit.
                if self._runs.get(id) is run:
                    del self._runs[id]

    def attach(self, run: Run, row: Row) -> None:
        """Give a run its row. The row is canceled if the run is."""
        with self._lock:
            run.row = row
            row.canceled = run.is_canceled

    def cancel(self, id: str) -> None:
        """Mark a job as canceled: its next run ends before it starts. `abandon` ends the current run."""
        with self._lock:
            self._canceled.add(id)

    def abandon(self, id: str) -> Run | None:
        """Mark a job's current run as canceled, if there is one; another run of the job may follow."""
        with self._lock:
            run = self._runs.get(id)
            if run is not None:
                run.is_canceled = True
        return run

    def of(self, ids: Sequence[str]) -> list[Run]:
        """The current runs of these jobs."""
        with self._lock:
            return [self._runs[id] for id in ids if id in self._runs]

    def is_canceled(self, id: str) -> bool:
        return id in self._canceled

    def forget(self, id: str) -> None:
        """The job has ended: a later one with its id is a new job."""
        self._canceled.discard(id)


def deadline_of(job: Job, context: JobContext) -> float | None:
    """The time.monotonic() at which the job ends with the text so far; None for never."""
    limits = []
    if job.deadline_s is not None:
        submitted = time.time() if context.submitted_at is None else context.submitted_at
        limits.append(submitted + job.deadline_s - time.time())
    if context.soft_limit_s is not None:
        limits.append(context.soft_limit_s)
    return time.monotonic() + min(limits) if limits else None
