"""Redis goes away, hangs, is full, or takes a dead worker's message with it: no job is lost, and the worker goes on."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from celery.result import AsyncResult
from kombu import Connection

from tests.support.redis_servers import RestartableServer
from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

OURS = "worker.queue.transport:Transport"
#: Workers frozen and killed; more with FREEZES=20 in the environment.
FREEZES = int(os.environ.get("FREEZES", "3"))
#: Seconds that a fault lasts; longer with FAULT_S=40.
FAULT_S = float(os.environ.get("FAULT_S", "2"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableServer]:
    server = RestartableServer(tmp_path_factory.mktemp("data"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def worker(server: RestartableServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    log = tmp_path_factory.mktemp("worker") / "log"
    settings = {"MODEL": "fake:0.02", "PREFETCH": "4", "VISIBILITY_TIMEOUT_S": "3600"}
    with stack.worker(server.broker(), settings=settings, log=log) as process:
        yield process


@pytest.fixture
def jobs(server: RestartableServer, worker: subprocess.Popen[bytes]) -> Iterator[list[AsyncResult]]:
    """Half of them run or wait in the worker, when the fault comes; after the test all have their answers."""
    producer = Producer(server.broker())
    jobs = [producer.complete(f"word-{number}", tokens=10).apply_async() for number in range(30)]
    jobs.append(producer.complete("word-30", tokens=10).apply_async(countdown=1.0))
    eventually(lambda: jobs[5].state == "SUCCESS")
    assert jobs[-1].state == "PENDING"
    yield jobs
    assert [job.get(timeout=PATIENCE_S)["text"] for job in jobs] == [f"word-{n}"[-10:] for n in range(len(jobs))]
    with server.broker().connect() as client:
        eventually(lambda: producer.queued() == client.hlen("unacked") == client.zcard("unacked_index") == 0)
    assert worker.poll() is None


def test_a_frozen_idle_worker_that_is_killed_loses_no_job(broker: stack.Broker) -> None:
    assert sum(_lost_by_a_frozen_worker(broker, OURS) for _ in range(FREEZES)) == 0


def _lost_by_a_frozen_worker(broker: stack.Broker, transport: str) -> int:
    """Jobs lost of one that is sent to a worker which is then killed without having run again."""
    command = [sys.executable, "-m", "tests.flow.taker", broker.url, transport]
    with broker.connect() as client, subprocess.Popen(command, stdout=subprocess.PIPE, cwd=stack.CHECKOUT) as taker:
        client.flushdb()
        assert taker.stdout is not None
        assert taker.stdout.readline() == b"ready\n"
        # Anywhere between two of its takes.
        time.sleep(random.uniform(0.1, 0.2))
        taker.send_signal(signal.SIGSTOP)
        with Connection(broker.url) as connection:
            connection.Producer().publish({"a": "job"}, routing_key="jobs")
        time.sleep(0.1)
        taker.kill()
        return 1 - client.llen("jobs") - client.hlen("unacked")


def test_a_worker_goes_on_after_a_restart_of_redis(server: RestartableServer, jobs: list[AsyncResult]) -> None:
    server.kill()
    time.sleep(0.5)
    server.start()


def test_a_worker_goes_on_after_its_connections_drop(server: RestartableServer, jobs: list[AsyncResult]) -> None:
    with server.broker().connect() as client:
        for _ in range(3):
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub")
            time.sleep(0.3)


def test_a_worker_waits_for_a_redis_that_hangs(server: RestartableServer, jobs: list[AsyncResult]) -> None:
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(FAULT_S)
    server.process.send_signal(signal.SIGCONT)


def test_results_wait_for_a_redis_that_is_full(server: RestartableServer, jobs: list[AsyncResult]) -> None:
    with server.broker().connect() as client:
        client.config_set("maxmemory", 1)
        time.sleep(FAULT_S)
        client.config_set("maxmemory", 0)


def test_results_wait_for_a_redis_whose_disk_is_full(server: RestartableServer, jobs: list[AsyncResult]) -> None:
    server.limit_disk(1)
    with server.broker().connect() as client:
        eventually(lambda: client.info("persistence")["aof_last_write_status"] == "err")
        time.sleep(FAULT_S)
    server.limit_disk(resource.RLIM_INFINITY)
