"""The queue exporter: `python -m worker.observability.queue` serves metrics of the queues to Prometheus.

It is a process of its own, one for each Redis: it counts jobs although no worker lives, which is when an autoscaler
needs the number, and it has neither a worker's rights nor a callbacks worker's. At each scrape it reads Redis in a few
round trips, however many jobs wait, as the Redis user `exporter`. The user `monitor` suffices too; it may not look at
messages, so a job's age is then counted from when this process first saw jobs in its list.

If Redis does not answer within seconds, `idefics_redis_up` is 0, and what it alone knows is left out.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from config.settings import PREFIX, Settings, load
from tasks.apps import app_at
from tasks.outbox import connect
from tasks.queue_state import QueueReader, QueueState
from tasks.redis_keys import (
    DELIVERED,
    DELIVERY_HOSTS,
    FAILED,
    OLDEST_DELIVERIES,
    PENDING_DELIVERIES,
    UNDELIVERED,
    broker_prefix,
    results_prefix,
)
from worker.observability import log_setup, setup_hook
from worker.observability.exposition import serve
from worker.observability.metrics import Definition

logger = logging.getLogger(__name__)

#: Seconds without an answer after which Redis counts as away: less than Prometheus waits for a scrape.
TIMEOUT_S = 2.0
#: Seconds for which one reading serves several scrapes.
FRESH_S = 1.0
#: Hosts whose pending callbacks are counted. Each further one counts as one callback.
MAX_HOSTS = 1_000


def exporter_app(settings: Settings) -> Celery:
    """An app on the workers' Redis that gives up soon."""
    app = app_at(settings.broker_url.get_secret_value(), settings.result_backend.get_secret_value())
    timeouts = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, **timeouts, "max_retries": 0}
    app.conf.update({f"redis_{name}": seconds for name, seconds in timeouts.items()})
    return app


def _gauge(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(name, "gauge", labels, meaning)


#: By name, in the order of the documentation.
GAUGES = {
    gauge.name: gauge
    for gauge in (
        _gauge("idefics_redis_up", "1 if Redis answers, by database: queues or results.", "database"),
        _gauge("idefics_queue_jobs", "Jobs that no worker has taken yet, by priority.", "queue", "priority"),
        _gauge("idefics_queue_jobs_waiting", "Jobs that no worker has taken yet, of all priorities.", "queue"),
        _gauge(
            "idefics_queue_oldest_job_age_seconds",
            "Age of the oldest waiting job; 0 if none waits. Of a message without the header `idefics_submitted_at`, "
            "which our client sends: seconds since the exporter first saw it next in its list.",
            "queue",
        ),
        _gauge("idefics_queue_jobs_scheduled", "Jobs that wait for their countdown or eta.", "queue"),
        _gauge("idefics_queue_jobs_in_flight", "Jobs that workers hold, of all queues."),
        _gauge("idefics_queue_workers", "Workers that take from the queue.", "queue"),
        _gauge("idefics_queue_dead_letters", "Failed jobs and refused messages that are kept: `idefics-jobs failed`."),
        _gauge("idefics_callbacks", "Callbacks in Redis: pending, delivered or failed.", "state"),
        _gauge("idefics_callbacks_oldest_pending_age_seconds", "Age of the oldest pending callback; 0 without one."),
    )
}


class _Families(dict[str, GaugeMetricFamily]):
    """The metrics of one reading, by name."""

    def add(self, name: str, value: float | None, *labels: str) -> None:
        """Add a sample; nothing for None, which this user may not know."""
        if value is not None:
            definition = GAUGES[name]
            family = self.setdefault(name, GaugeMetricFamily(name, definition.meaning, labels=definition.labels))
            family.add_metric(labels, value)


class QueueCollector(Collector):
    """Reads Redis when it is scraped. Safe for several scrapes at a time, which share a reading."""

    def __init__(self, app: Celery, queue: str) -> None:
        """`queue` is shown in addition to the queues of the models that workers have registered."""
        self._app = app
        self._queue = queue
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._families = _Families()
        self._broker: Redis | None = None
        self._reader: QueueReader | None = None
        #: By database, why it could not be read the last time.
        self._errors: dict[str, str] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering this collector reads nothing."""
        return ()

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_S:
                self._families = self._read()
                self._read_at = time.monotonic()
            return list(self._families.values())

    def _read(self) -> _Families:
        found = _Families()
        for database, read in (("queues", self._read_broker), ("results", self._read_results)):
            families, error = _Families(), ""
            try:
                read(families)
            except (RedisError, OperationalError, OSError) as raised:
                families, error = _Families(), str(raised) or type(raised).__name__
            found |= families
            found.add("idefics_redis_up", not error, database)
            if error and error != self._errors.get(database):
                logger.warning("The Redis database of the %s cannot be read: %s", database, error)
            self._errors[database] = error
        return found

    def _read_broker(self, families: _Families) -> None:
        """Raises RedisError or OperationalError."""
        if self._broker is None or self._reader is None:
            self._broker = _never_retrying(connect(self._app))
            self._reader = QueueReader(self._app, self._broker)
        for state in self._reader.read(self._queue, with_known=True).values():
            _add_queue(state, families)
        _add_callbacks(self._broker, broker_prefix(self._app), families)

    def _read_results(self, families: _Families) -> None:
        """Raises RedisError."""
        results = _never_retrying(self._app.backend.client)
        with _if_permitted():
            families.add("idefics_queue_dead_letters", results.zcard(results_prefix(self._app) + FAILED.named()))


def _never_retrying(redis: Any) -> Any:
    """The same client. A scrape must not wait for an answer several times."""
    redis.set_retry(Retry(NoBackoff(), 0))
    return redis


def _if_permitted() -> contextlib.suppress:
    """What this Redis user may not read is left out."""
    return contextlib.suppress(NoPermissionError)


def _add_queue(state: QueueState, families: _Families) -> None:
    for priority, count in state.by_priority.items():
        families.add("idefics_queue_jobs", count, state.queue, str(priority))
    families.add("idefics_queue_jobs_waiting", state.waiting, state.queue)
    families.add("idefics_queue_oldest_job_age_seconds", state.oldest_age_s or 0.0, state.queue)
    families.add("idefics_queue_jobs_scheduled", state.due_later, state.queue)
    families.add("idefics_queue_workers", None if state.workers is None else len(state.workers), state.queue)
    if "idefics_queue_jobs_in_flight" not in families:
        families.add("idefics_queue_jobs_in_flight", state.in_flight)


def _add_callbacks(redis: Any, prefix: str, families: _Families) -> None:
    """Raises RedisError."""
    with _if_permitted(), redis.pipeline(transaction=False) as pipe:
        pipe.zcard(prefix + DELIVERED.named())
        pipe.zcard(prefix + UNDELIVERED.named())
        pipe.zcard(prefix + DELIVERY_HOSTS.named())
        pipe.zrange(prefix + DELIVERY_HOSTS.named(), 0, MAX_HOSTS - 1)
        pipe.zrange(prefix + OLDEST_DELIVERIES.named(), 0, 0, withscores=True)
        pipe.time()
        delivered, failed, all_hosts, hosts, oldest, (seconds, _) = pipe.execute()
        for host in hosts:
            pipe.zcard(prefix + PENDING_DELIVERIES.named(host.decode()))
        pending = sum(pipe.execute()) + all_hosts - len(hosts)
        for state, count in (("pending", pending), ("delivered", delivered), ("failed", failed)):
            families.add("idefics_callbacks", count, state)
        age = max(0.0, seconds - oldest[0][1]) if oldest else 0.0
        families.add("idefics_callbacks_oldest_pending_age_seconds", age)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    settings = load()
    log_setup.set_up(settings, "queue")
    setup_hook.run(settings.setup, "queue")
    registry = CollectorRegistry()
    registry.register(QueueCollector(exporter_app(settings), settings.queue))
    ProcessCollector(registry=registry)
    serve(settings.queue_metrics_address, registry, f"{PREFIX}QUEUE_METRICS_ADDRESS")
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    logger.info("Metrics of the queues are at http://%s/metrics.", settings.queue_metrics_address)
    ending.wait()


if __name__ == "__main__":
    main()
