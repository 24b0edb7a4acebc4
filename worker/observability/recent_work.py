"""This worker's recent work, computed from its metrics for `idefics-jobs top` (tasks/worker_status.py)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import Metric

from tasks.worker_status import DEFAULT_LIMITS, FAILURES_S, RATES_S, WorkerLimits, WorkerStatus


@dataclass(slots=True)
class Totals:
    """The metrics at time.monotonic() `at`, since the worker's start."""

    at: float
    jobs: float = 0.0
    tokens: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    #: Of the gauges without a label.
    gauges: dict[str, float] = field(default_factory=dict)
    state: str = "unknown"


class RecentWork:
    """Keeps the totals of the last minutes. Used by one thread."""

    def __init__(
        self, collect: Callable[[], Iterable[Metric]], model: str, limits: WorkerLimits = DEFAULT_LIMITS
    ) -> None:
        """`collect` returns the worker's metrics, those of both its processes."""
        self._collect = collect
        self._model = model
        self._limits = limits
        self._kept: deque[Totals] = deque()

    def status(self, now: float) -> WorkerStatus:
        """The status at time.monotonic() `now`."""
        totals = totals_of(self._collect(), now)
        self._kept.append(totals)
        # The newest one of those that are old enough stays.
        while len(self._kept) > 1 and now - self._kept[1].at >= FAILURES_S:
            self._kept.popleft()
        recent = next(kept for kept in self._kept if now - kept.at <= RATES_S)
        seconds = now - recent.at
        return WorkerStatus(
            state=totals.state,
            model=self._model,
            jobs=int(totals.gauges.get("idefics_num_jobs_in_flight", 0)),
            waiting_for_host=int(totals.gauges.get("idefics_num_jobs_waiting_for_host", 0)),
            rows=int(totals.gauges.get("idefics_num_requests_running", 0)),
            max_rows=int(totals.gauges.get("idefics_engine_max_rows", 0)),
            jobs_per_s=round((totals.jobs - recent.jobs) / seconds, 2) if seconds else 0.0,
            tokens_per_s=round((totals.tokens - recent.tokens) / seconds, 1) if seconds else 0.0,
            failures=dict(totals.failures - self._kept[0].failures),
            limits=self._limits,
        )


def totals_of(metrics: Iterable[Metric], at: float) -> Totals:
    """Add up what a status needs."""
    totals = Totals(at)
    for sample in (sample for metric in metrics for sample in metric.samples):
        match sample.name, sample.labels:
            case "idefics_jobs_total", {"state": "failed", "code": code}:
                totals.jobs += sample.value
                totals.failures[code] += int(sample.value)
            case "idefics_jobs_total", {"state": "succeeded" | "canceled" | "expired"}:
                totals.jobs += sample.value
            case "idefics_generation_tokens_total", _:
                totals.tokens += sample.value
            case "idefics_worker_state", {"state": state} if sample.value:
                totals.state = state
            case name, {**labels} if not labels:
                totals.gauges[name] = sample.value
    return totals
