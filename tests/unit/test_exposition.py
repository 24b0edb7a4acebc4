"""Metrics of two processes: added up, and kept when the model process dies."""

from __future__ import annotations

import socket

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from worker.observability.exposition import BothProcesses, ChangedValues, ModelProcessValues, serve


class Process:
    """A process's own copies of some metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter("jobs_total", "Jobs.", ["state"], registry=self.registry)
        self.rows = Gauge("rows", "Rows.", registry=self.registry)
        self.seconds = Histogram("seconds", "Seconds.", buckets=(1, 2), registry=self.registry)
        self.changed = ChangedValues(self.registry)


@pytest.fixture
def kept() -> ModelProcessValues:
    return ModelProcessValues()


def exposed(kept: ModelProcessValues, parent: Process) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(BothProcesses(kept, parent.registry))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value for each in families for sample in each.samples
    }


def test_a_process_sends_only_what_has_changed() -> None:
    process = Process()
    process.jobs.labels("failed").inc()
    assert ("jobs", "jobs_total", (("state", "failed"),)) in process.changed.take()
    assert process.changed.take() == {}
    process.rows.set(2)
    assert process.changed.take() == {("rows", "rows", ()): 2.0}


def test_counters_and_histograms_of_both_processes_are_added_up(kept: ModelProcessValues) -> None:
    parent, model = Process(), Process()
    for process in (parent, model):
        process.jobs.labels("failed").inc()
        process.seconds.observe(1.5)
    model.jobs.labels("succeeded").inc(3)
    model.rows.set(7)
    kept.update(model.changed.take())
    found = exposed(kept, parent)
    assert found["jobs_total", "failed"] == 2
    assert found["jobs_total", "succeeded"] == 3
    assert found["rows", ""] == 7
    assert [found["seconds_bucket", bound] for bound in ("1.0", "2.0", "+Inf")] == [0, 2, 2]
    assert found["seconds_sum", ""] == 3.0


def test_a_dead_process_leaves_its_counters_and_takes_its_gauges_with_it(kept: ModelProcessValues) -> None:
    parent, model, next_model = Process(), Process(), Process()
    model.jobs.labels("failed").inc(2)
    model.seconds.observe(5)
    model.rows.set(7)
    kept.update(model.changed.take())
    kept.process_ended(parent.registry)
    assert exposed(kept, parent)["jobs_total", "failed"] == 2
    assert exposed(kept, parent)["rows", ""] == 0
    next_model.jobs.labels("failed").inc()
    kept.update(next_model.changed.take())
    kept.process_ended(parent.registry)
    found = exposed(kept, parent)
    assert found["jobs_total", "failed"] == 3
    assert found["seconds_count", ""] == 1


def test_an_address_in_use_is_refused_with_the_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit, match=rf"{address} cannot be used .*name another address"):
            serve(address, CollectorRegistry())
