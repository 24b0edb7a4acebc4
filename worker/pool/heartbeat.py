"""What the model process sends regularly: heartbeats with the engine's throughput, and metrics."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tasks.worker_registry import RENEW_S
from worker.engine.interfaces import Model
from worker.engine.throughput import Throughput
from worker.observability import tracing
from worker.observability.exposition import ChangedValues
from worker.observability.redaction import without_message
from worker.pool.wire import BlockingChannel, Heartbeat, Metrics

logger = logging.getLogger(__name__)

#: Seconds between two heartbeats, and the minimum between two if the capacity has changed.
HEARTBEAT_S, MIN_HEARTBEAT_S = 0.5, 0.05
#: Minimum seconds between two messages with metrics. An idle engine's heartbeats come every second.
METRICS_S = 0.9
#: The same where no metrics are served: the parent then needs some for the worker's status in Redis only.
UNSERVED_METRICS_S = RENEW_S - 0.1


class MetricsSender:
    """Sends the values of metrics that have changed to the parent. Thread-safe."""

    def __init__(self, channel: BlockingChannel, interval_s: float) -> None:
        self._channel = channel
        self._interval_s = interval_s
        self._values = ChangedValues()
        self._sent_at = 0.0
        self._lock = threading.Lock()

    def send_if_due(self) -> None:
        if time.monotonic() - self._sent_at >= self._interval_s:
            self.send()

    def send(self) -> None:
        with self._lock:
            self._sent_at = time.monotonic()
            try:
                changed = self._values.take()
            except Exception as error:
                # The engine must go on.
                logger.error("The metrics cannot be read.", exc_info=without_message(error))
                return
            self._channel.send(Metrics(changed))


class HeartbeatSender:
    """Called at each step of the engine; sends heartbeats with metrics and throughput to the parent."""

    def __init__(self, channel: BlockingChannel, model: Model, max_rows: int, metrics: MetricsSender) -> None:
        self.throughput: Callable[[], Throughput] = lambda: Throughput(max_rows, max_rows, 0.0)
        #: The number of running rows.
        self.rows: Callable[[], int] = int
        self._channel = channel
        self._model = model
        self._metrics = metrics
        self._sent_at = 0.0
        self._sent_capacity = 0

    def __call__(self) -> None:
        tracing.step(self.rows)
        since_s = time.monotonic() - self._sent_at
        if since_s < MIN_HEARTBEAT_S:
            return
        throughput = self.throughput()
        if since_s >= HEARTBEAT_S or throughput.capacity != self._sent_capacity:
            self._sent_at, self._sent_capacity = time.monotonic(), throughput.capacity
            self._channel.send(Heartbeat(self._model.metrics(), *throughput))
            self._metrics.send_if_due()
