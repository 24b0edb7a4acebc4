"""Serves metrics over HTTP in Prometheus's format, and adds up those of a GPU worker's two processes.

The model process sends the values that have changed (`ChangedValues`) with its heartbeat. The parent keeps them in
`MODEL_PROCESS`: counters and histograms of processes that died stay in the sums, their gauges do not.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from worker.observability.metrics import CALLBACKS, WORKER

#: A sample of a metric: the names of both, and the labels.
Sample: TypeAlias = tuple[str, str, tuple[tuple[str, str], ...]]
Values: TypeAlias = Mapping[Sample, float]

#: Metrics of these types lose their values with their process.
GAUGES = ("gauge", "info", "unknown")


def values_of(metrics: Iterable[Metric]) -> dict[Sample, float]:
    """The value of each sample, without the times when the metrics were made."""
    return {
        (metric.name, sample.name, tuple(sample.labels.items())): sample.value
        for metric in metrics
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


class ChangedValues:
    """The values of a registry that have changed since they were last taken."""

    def __init__(self, registry: CollectorRegistry = WORKER) -> None:
        self._registry = registry
        self._taken: dict[Sample, float] = {}

    def take(self) -> Values:
        values = values_of(self._registry.collect())
        changed = {sample: value for sample, value in values.items() if self._taken.get(sample) != value}
        self._taken = values
        return changed


@dataclass
class ModelProcessValues:
    """What the model process has counted, and those before it. Thread-safe."""

    _current: dict[Sample, float] = field(default_factory=dict)
    _ended: dict[Sample, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, changed: Values) -> None:
        with self._lock:
            self._current.update(changed)

    def process_ended(self, registry: CollectorRegistry = WORKER) -> None:
        """Keep the counters and histograms of a process that has ended."""
        gauges = {metric.name for metric in registry.collect() if metric.type in GAUGES}
        with self._lock:
            _add({sample: value for sample, value in self._current.items() if sample[0] not in gauges}, self._ended)
            self._current.clear()

    def add_to(self, values: dict[Sample, float]) -> None:
        """Add the values of all model processes to these."""
        with self._lock:
            _add(self._ended, values)
            _add(self._current, values)


def _add(values: Values, sums: dict[Sample, float]) -> None:
    for sample, value in values.items():
        sums[sample] = sums.get(sample, 0.0) + value


#: Of this worker.
MODEL_PROCESS = ModelProcessValues()


class BothProcesses(Collector):
    """Collects the metrics of a GPU worker."""

    def __init__(self, model_process: ModelProcessValues, registry: CollectorRegistry = WORKER) -> None:
        self._model_process = model_process
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        own = list(self._registry.collect())
        metrics = {metric.name: Metric(metric.name, metric.documentation, metric.type) for metric in own}
        values = values_of(own)
        self._model_process.add_to(values)
        for (metric, name, labels), value in values.items():
            metrics[metric].add_sample(name, dict(labels), value)
        return metrics.values()


def serve_worker(address: str) -> None:
    """Serve a GPU worker's metrics at `address`, unless it is empty. Ends the program if it cannot."""
    _serve(address, BothProcesses(MODEL_PROCESS))


def serve_callbacks(address: str) -> None:
    """The same for a callbacks worker."""
    _serve(address, CALLBACKS)


def _serve(address: str, metrics: Collector) -> None:
    if not address:
        return
    exposed = CollectorRegistry()
    exposed.register(metrics)
    ProcessCollector(registry=exposed)
    serve(address, exposed)


def serve(address: str, registry: CollectorRegistry, setting: str = "IDEFICS_METRICS_ADDRESS") -> None:
    """Serve a registry at `address` (host:port), in threads. Ends the program with the cure if it cannot.

    `setting`: the name of the setting that the address is from.
    """
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        sys.exit(
            f"{setting}={address} cannot be used ({error.strerror or error}): stop what listens there, "
            "or name another address. Each process of a machine needs a port of its own."
        )
