"""A worker's recent work, from the metrics of a registry: rates of half a minute, failures of five minutes."""

from __future__ import annotations

import json

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from config.settings import Settings
from tasks.worker_status import DEFAULT_LIMITS, WorkerStatus
from worker.observability import metrics
from worker.observability.recent_work import RecentWork
from worker.queue.worker_registration import limits_of


class Counted:
    """Metrics with the workers' names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter("idefics_jobs_total", "-", ("task", "state", "code"), registry=self.registry)
        self.tokens = Counter("idefics_generation_tokens_total", "-", registry=self.registry)
        self.rows = Gauge("idefics_num_requests_running", "-", registry=self.registry)
        self.state = Gauge("idefics_worker_state", "-", ("state",), registry=self.registry)
        self.work = RecentWork(self.registry.collect, "demo")

    def end(self, count: int, state: str = "succeeded", code: str = "") -> None:
        self.jobs.labels("idefics.caption", state, code).inc(count)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_at_first_nothing_has_happened(counted: Counted) -> None:
    # Metrics may be older than the registration, as after a reconnect.
    counted.end(100)
    counted.end(5, "failed", "internal")
    status = counted.work.status(0.0)
    assert (status.state, status.model, status.jobs_per_s, status.failures) == ("unknown", "demo", 0.0, {})


def test_rates_are_those_of_the_last_half_minute(counted: Counted) -> None:
    counted.work.status(0.0)
    for now in range(5, 65, 5):
        # 10 jobs a second, then 2.
        counted.end(50 if now <= 30 else 10)
        counted.tokens.inc(500 if now <= 30 else 100)
        status = counted.work.status(float(now))
        if now == 30:
            assert (status.jobs_per_s, status.tokens_per_s) == (10.0, 100.0)
    assert (status.jobs_per_s, status.tokens_per_s) == (2.0, 20.0)


def test_jobs_that_went_back_to_the_queue_did_not_end(counted: Counted) -> None:
    counted.work.status(0.0)
    for state in ("succeeded", "canceled", "expired", "returned"):
        counted.end(10, state)
    counted.end(10, "failed", "invalid_request")
    assert counted.work.status(10.0).jobs_per_s == 4.0


def test_failures_are_counted_by_code_and_leave_after_five_minutes(counted: Counted) -> None:
    counted.work.status(0.0)
    counted.end(3, "failed", "image_unreachable")
    assert counted.work.status(5.0).failures == {"image_unreachable": 3}
    counted.end(2, "failed", "invalid_request")
    for now in range(10, 300, 5):
        assert counted.work.status(float(now)).failures == {"image_unreachable": 3, "invalid_request": 2}
    assert counted.work.status(306.0).failures == {"invalid_request": 2}
    assert counted.work.status(311.0).failures == {}


def test_the_batch_and_the_state_are_those_of_now(counted: Counted) -> None:
    counted.rows.set(3)
    counted.state.labels("ready").set(1)
    counted.state.labels("busy").set(0)
    assert (counted.work.status(0.0).rows, counted.work.status(0.0).state) == (3, "ready")
    counted.state.labels("ready").set(0)
    counted.state.labels("busy").set(1)
    assert counted.work.status(5.0).state == "busy"


def test_the_names_are_those_of_the_workers_metrics() -> None:
    names = {definition.name for definition in metrics.DEFINITIONS[metrics.WORKER]}
    assert names >= {
        "idefics_jobs_total",
        "idefics_generation_tokens_total",
        "idefics_num_jobs_in_flight",
        "idefics_num_requests_running",
        "idefics_engine_max_rows",
        "idefics_worker_state",
    }


def test_a_status_has_the_workers_limits_and_reads_those_of_other_versions(counted: Counted) -> None:
    limits = limits_of(Settings(image_host_concurrency=3, prefetch=30, max_retries=1))
    assert (limits.host_concurrency, limits.image_jobs, limits.max_retries) == (3, 10, 1)
    status = RecentWork(counted.registry.collect, "demo", limits).status(0.0)
    assert WorkerStatus.read(status.written()) == status
    older = {name: value for name, value in json.loads(status.written()).items() if name != "limits"}
    assert WorkerStatus.read(json.dumps(older)).limits == DEFAULT_LIMITS
    newer = {**older, "limits": {"host_concurrency": 2, "unheard_of": 1}}
    assert WorkerStatus.read(json.dumps(newer)).limits.host_concurrency == 2


def test_the_limits_of_a_worker_that_tells_none_are_those_of_the_default_settings() -> None:
    assert limits_of(Settings()) == DEFAULT_LIMITS
