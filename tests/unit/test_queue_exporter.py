"""The queue exporter on a real Redis: what it serves, and that no state of Redis breaks or delays a scrape."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery
from prometheus_client import CollectorRegistry

from config.settings import Settings
from tasks import Client, Complete
from tasks.failed import FailedBounds, FailedJob, FailedJobs
from tasks.outbox import Outbox
from tasks.redis_keys import DUE, UNACKED
from tasks.worker_registry import ServedModel, models_key, workers_key
from tests.support.outbox import KEEP_S, delivery
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.observability.queue import GAUGES, MAX_HOSTS, TIMEOUT_S, QueueCollector, exporter_app

JOB = Complete(prompt=["Hello"])


@pytest.fixture
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server:
        yield server


@pytest.fixture
def app(server: stack.Broker) -> Celery:
    return exporter_app(Settings(broker_url=server.url))


class Scraped:
    """The samples of one scrape."""

    def __init__(self, collector: QueueCollector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        self.names = {metric.name for metric in self._registry.collect()}

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"idefics_{name}", labels)


def scrape(app: Celery) -> Scraped:
    return Scraped(QueueCollector(app, "idefics"))


def test_every_metric_of_the_table_is_served(server: stack.Broker, app: Celery) -> None:
    assert scrape(app).names == set(GAUGES)


def test_jobs_are_counted_by_priority_and_over_all(server: stack.Broker, app: Celery) -> None:
    client, redis = Client(server.url), server.connect()
    for priority, count in ((0, 1), (3, 2), (9, 3)):
        for _ in range(count):
            client.submit(JOB, priority=priority)
    redis.zadd(DUE.named("idefics"), {"a": 1})
    redis.hset(UNACKED.named(), "tag", "message")
    found = scrape(app)
    counts = {priority: found("queue_jobs", queue="idefics", priority=str(priority)) for priority in range(10)}
    assert counts == {**dict.fromkeys(range(10), 0), 0: 1, 3: 2, 9: 3}
    assert found("queue_jobs_waiting", queue="idefics") == 6
    assert found("queue_jobs_scheduled", queue="idefics") == 1
    assert found("queue_jobs_in_flight") == 1
    assert 0 < (found("queue_oldest_job_age_seconds", queue="idefics") or 0) < 10
    assert found("redis_up", database="queues") == found("redis_up", database="results") == 1


def test_every_models_queue_is_shown_with_its_workers(server: stack.Broker, app: Celery) -> None:
    redis, now = server.connect(), time.time()
    redis.zadd(models_key(app), {ServedModel("m/large", "idefics.large").written(): now - 3_600})
    redis.zadd(workers_key(app, "idefics"), {"gpu0": now, "gpu1": now})
    found = scrape(app)
    assert found("queue_workers", queue="idefics") == 2
    assert found("queue_workers", queue="idefics.large") == 0
    assert found("queue_oldest_job_age_seconds", queue="idefics.large") == 0


def test_failed_jobs_are_counted(server: stack.Broker, app: Celery) -> None:
    job = FailedJob(id="a", task="t", code="c", message="m", host="h", attempts=1, submitted_at=None, failed_at=1.0)
    FailedJobs(Client(server.url).app).keep(job, {}, FailedBounds(10, 10_000, 600))
    assert scrape(app)("queue_dead_letters") == 1


def test_callbacks_are_counted_by_state_with_the_oldest_ones_age(server: stack.Broker, app: Celery) -> None:
    outbox = Outbox(server.connect())
    for number in range(4):
        outbox.add(delivery(number))
    first, second, *_ = outbox.claim(2, 60)
    outbox.end(first, "delivered", "status 204", KEEP_S)
    outbox.end(second, "failed", "status 410", KEEP_S)
    time.sleep(1)
    found = scrape(app)
    counts = {state: found("callbacks", state=state) for state in ("pending", "delivered", "failed")}
    assert counts == {"pending": 2, "delivered": 1, "failed": 1}
    assert 0 < (found("callbacks_oldest_pending_age_seconds") or 0) < 10


def test_callbacks_to_any_number_of_hosts_cost_a_bounded_number_of_commands(server: stack.Broker, app: Celery) -> None:
    redis = server.connect()
    redis.zadd("idefics:callbacks:hosts", {f"host-{number}": number for number in range(MAX_HOSTS + 500)})
    with redis.pipeline() as pipe:
        for number in range(MAX_HOSTS + 500):
            pipe.zadd(f"idefics:callbacks:pending:host-{number}", {"a": 1, "b": 2})
        pipe.execute()
    assert scrape(app)("callbacks", state="pending") == 2 * MAX_HOSTS + 500


def test_scrapes_at_the_same_time_share_a_reading(server: stack.Broker, app: Celery) -> None:
    collector = QueueCollector(app, "idefics")
    list(collector.collect())
    before = server.connect().info("commandstats")["cmdstat_llen"]["calls"]
    threads = [threading.Thread(target=lambda: list(collector.collect())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.connect().info("commandstats")["cmdstat_llen"]["calls"] <= 2 * before


def test_a_redis_that_is_away_is_told_and_comes_back(app: Celery, server: stack.Broker) -> None:
    server.process.kill()
    server.process.wait()
    found = scrape(app)
    assert found.names == {"idefics_redis_up"}
    assert found("redis_up", database="queues") == found("redis_up", database="results") == 0
    with stack.broker(port=server.port):
        assert scrape(app)("redis_up", database="queues") == 1


def test_a_frozen_redis_delays_a_scrape_for_seconds_only(server: stack.Broker, app: Celery) -> None:
    collector = QueueCollector(app, "idefics")
    assert Scraped(collector)("redis_up", database="queues") == 1
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        time.sleep(1.1)
        begun = time.monotonic()
        assert {metric.name for metric in collector.collect()} == {"idefics_redis_up"}
        # One timeout for each database. Prometheus waits for 10 s.
        assert time.monotonic() - begun < 2 * TIMEOUT_S + 1.5
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    time.sleep(1.1)
    assert "idefics_queue_jobs_waiting" in {metric.name for metric in collector.collect()}


# The process


@contextmanager
def exporter(server: stack.Broker, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": server.url} | {f"IDEFICS_{name}": value for name, value in settings.items()}
    with stack.started([sys.executable, "-m", "worker.observability.queue"], log=log, environment=environment) as run:
        yield run


def test_the_process_serves_on_loopback_and_ends_when_it_is_told(server: stack.Broker, tmp_path: Path) -> None:
    Client(server.url).submit(JOB)
    port = stack.free_port()
    with exporter(server, tmp_path / "log", QUEUE_METRICS_ADDRESS=str(port)) as process:
        stack.await_line(process, tmp_path / "log", f"127.0.0.1:{port}", PATIENCE_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
        process.terminate()
        eventually(lambda: process.poll() == 0)
    assert 'idefics_queue_jobs_waiting{queue="idefics"} 1.0' in text


def test_an_address_in_use_ends_the_process_with_the_cure(server: stack.Broker, tmp_path: Path) -> None:
    with exporter(server, tmp_path / "log", QUEUE_METRICS_ADDRESS=f"127.0.0.1:{server.port}") as process:
        assert process.wait(PATIENCE_S) == 1
    assert "IDEFICS_QUEUE_METRICS_ADDRESS" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("value", ["x", "0.0.0.0:", ":70000", "http://a:1"])
def test_another_form_of_an_address_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="queue_metrics_address"):
        Settings(queue_metrics_address=value)
