"""A dry run: what a campaign would do, before any of it is sent but a sample.

All rows are checked, then the sample runs as jobs on the workers, so that it shows what they see: the workers' own
rules for addresses, the hosts' answers, the model's speed.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from redis.exceptions import NoPermissionError

from ..bulk import bulk_of, ignore_sent
from ..errors import JobError
from ..payloads import Job
from ..queue_state import QueueReader, QueueState
from ..worker_registry import no_worker
from ..worker_status import DEFAULT_LIMITS, WorkerStatus
from .forecast import Forecast, forecast
from .observation import Fleet, SampledJob
from .plan import Plan
from .sample import Sample, Sampler
from .tables import BadRow, Table
from .validation import Validation, validate

#: The sample's priority: before the usual 5, so that it need not wait for a long queue.
PRIORITY = 4
#: Seconds after which the sample's jobs that have not ended are canceled.
TIME_LIMIT_S = 600.0
#: Jobs that are sent between two polls, and seconds between polls.
SENT_AT_ONCE, POLL_S = 250, 0.1


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a campaign would do."""

    validation: Validation
    #: None if no row could be run.
    forecast: Forecast | None
    #: Seconds that the sample took, and its jobs that did not end in time.
    seconds: float = 0.0
    unfinished: int = 0
    #: What the user should know: sentences.
    notes: list[str] = field(default_factory=list)

    def as_dict(self, gpu_hour_price: float | None = None) -> dict[str, Any]:
        """For JSON."""
        forecast = self.forecast.as_dict(gpu_hour_price) if self.forecast else None
        sample = {"seconds": self.seconds, "unfinished": self.unfinished}
        return {**self.validation.as_dict(), "forecast": forecast, "sample": sample, "notes": self.notes}


def dry_run(
    client: Any,
    plan: Plan,
    table: Table,
    *,
    window: int = 1_000,
    priority: int = 9,
    size: int | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> DryRun:
    """Check all rows, run a sample of them and forecast the campaign.

    `window` and `priority` are the campaign's. `size`: rows of the sample; by default 1 %, at least 500 and at most
    5,000; some of each larger host are added. `on_progress` is told how far it is, often.

    Raises PlanError, TableError, QueueFull, BrokerUnavailable.
    """
    validation, sample = validate(plan, table, Sampler(seed, size), lambda rows: on_progress(f"{rows:,} rows checked"))
    if not sample.rows:
        return DryRun(validation, None, notes=["No row is valid: nothing was sent."])
    reader = QueueReader(client.app)
    state = reader.read(client.queue).get(client.queue)
    if state is not None and state.workers == []:
        return DryRun(validation, None, notes=[no_worker(client.queue)])
    names = state.workers if state is not None else None
    fleet = fleet_of(list(reader.statuses(names or []).values()), len(names or [None]))
    started = time.monotonic()
    run = _SampleRun(client, time_limit_s, on_progress)
    jobs = run.outcomes(_sampled_jobs(plan, table, sample), len(sample.chosen))
    notes = _notes(names, run.unfinished)
    queued = _waiting(state, priority)
    found = forecast(sample, jobs, fleet, window=window, queued=queued, seed=seed) if jobs else None
    return DryRun(validation, found, time.monotonic() - started, run.unfinished, notes)


def fleet_of(statuses: list[WorkerStatus], workers: int) -> Fleet:
    """The workers together. Those that tell nothing are taken for workers with the default settings."""
    limits = [each.limits for each in statuses] + [DEFAULT_LIMITS] * (workers - len(statuses))
    slots = sum(each.host_concurrency for each in limits)
    slots = min(slots, limits[0].host_shared or slots)
    return Fleet(workers, slots, sum(each.image_jobs for each in limits), limits[0])


def _waiting(state: QueueState | None, priority: int) -> int:
    """Jobs that run before the campaign's."""
    return sum(count for step, count in state.by_priority.items() if step <= priority) if state else 0


def _notes(workers: list[str] | None, unfinished: int) -> list[str]:
    notes = []
    if workers is None:
        notes.append("This Redis user may not list the workers: one with the default settings is assumed.")
    if unfinished:
        notes.append(
            f"{unfinished:,} jobs of the sample did not end in time and are not counted: the campaign takes longer "
            "than forecast. Allow more time, or take a smaller sample."
        )
    return notes


def _sampled_jobs(plan: Plan, table: Table, sample: Sample) -> Iterator[tuple[str, Job]]:
    """The group and the job of each chosen row, in the order of the table, which is read again."""
    last = max(sample.chosen)
    for number, row in enumerate(islice(iter(table), last), 1):
        if number in sample.chosen and not isinstance(row, BadRow):
            # The table may have changed.
            with contextlib.suppress(JobError):
                yield sample.chosen[number], plan.job(row)


@dataclass(slots=True)
class _Sent:
    host: str
    #: Unix seconds.
    at: float


class _SampleRun:
    """Sends a sample's jobs and collects their outcomes. Nothing of them stays in Redis."""

    def __init__(self, client: Any, time_limit_s: float, on_progress: Callable[[str], None]) -> None:
        self._client = client
        self._time_limit_s = time_limit_s
        self._on_progress = on_progress
        self._pending: dict[str, _Sent] = {}
        self._ended: list[SampledJob] = []

    @property
    def unfinished(self) -> int:
        return len(self._pending)

    def outcomes(self, jobs: Iterator[tuple[str, Job]], total: int) -> list[SampledJob]:
        """Those of the jobs that end in time; the others are canceled."""
        try:
            until = time.monotonic() + self._time_limit_s
            while time.monotonic() < until:
                has_more = self._send(list(islice(jobs, SENT_AT_ONCE)))
                self._collect()
                self._on_progress(f"{len(self._ended):,} of about {total:,} sampled rows run")
                if not has_more:
                    if not self._pending:
                        break
                    time.sleep(POLL_S)
        finally:
            for id in self._pending:
                self._client.cancel(id)
        return self._ended

    def _send(self, jobs: list[tuple[str, Job]]) -> bool:
        """False at the end of the jobs."""
        # As the campaign sends them: otherwise the workers would seem slower or faster beside the producer.
        with bulk_of(self._client, ignore_sent) as bulk:
            for host, job in jobs:
                id = str(uuid.uuid4())
                self._pending[id] = _Sent(host, time.time())
                bulk.submit(job, priority=PRIORITY, task_id=id)
        return bool(jobs)

    def _collect(self) -> None:
        found, now = self._client.outcomes(self._pending), time.time()
        for id, outcome in found.items():
            sent = self._pending.pop(id)
            self._ended.append(SampledJob(sent.host, sent.at, now, outcome))
        # A Redis user may not be allowed to delete results: they expire.
        with contextlib.suppress(NoPermissionError):
            self._client.forget(found)
