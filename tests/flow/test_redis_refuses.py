"""A Redis that refuses writes, or is away for some of what a job owes: every job ends as it should, and every link,
retry, chain and chord arrives."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import redis
from celery import chord, group
from celery.result import AsyncResult

from tests.support.redis_servers import RestartableServer, SeparateResults
from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Seconds that a fault lasts.
FAULT_S = 2.0
#: Of each kind of job.
COUNT = 24
#: Connections of a worker to one Redis at most, whatever it runs. docs/operation.md says so.
MOST_CONNECTIONS = 32


@dataclass(frozen=True)
class Site:
    """A worker with as many job threads as by default, its queues and its results."""

    queues: RestartableServer
    results: stack.Broker
    worker: subprocess.Popen[bytes]
    producer: Producer
    #: The address of an image; nothing listens there.
    nowhere: str

    @property
    def both(self) -> list[redis.Redis]:
        return [self.queues.broker().connect(), self.results.connect()]

    @property
    def model(self) -> psutil.Process:
        return psutil.Process(self.worker.pid).children()[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    queues = RestartableServer(tmp_path_factory.mktemp("data"))
    with stack.broker() as results:
        server = SeparateResults(queues.port, process=queues.process, results_server=results)
        settings = {"MODEL": "fake:0.02", "PREFETCH": "192", "RETRY_BACKOFF_S": "0.1", "IMAGE_TIMEOUT_S": "2"}
        settings |= {"IMAGE_ALLOW_NETWORKS": "127.0.0.0/8", "IMAGE_PORTS": str(stack.free_port())}
        log = tmp_path_factory.mktemp("worker") / "log"
        with stack.worker(server, settings=settings, log=log) as process:
            nowhere = f"http://127.0.0.1:{settings['IMAGE_PORTS']}/a.png"
            yield Site(queues, results, process, Producer(server), nowhere)
    queues.kill()


# Faults


@contextlib.contextmanager
def configured(site: Site, name: str, refuses: int, accepts: int) -> Iterator[None]:
    servers = site.both
    for server in servers:
        server.config_set(name, refuses)
    yield
    for server in servers:
        server.config_set(name, accepts)


def full(site: Site) -> contextlib.AbstractContextManager[None]:
    return configured(site, "maxmemory", 1, 0)


def without_replicas(site: Site) -> contextlib.AbstractContextManager[None]:
    return configured(site, "min-replicas-to-write", 1, 0)


@contextlib.contextmanager
def read_only(site: Site) -> Iterator[None]:
    """As after a failover: the old primary is a replica."""
    servers = site.both
    for server in servers:
        server.execute_command("REPLICAOF", "127.0.0.1", stack.free_port())
    yield
    for server in servers:
        server.execute_command("REPLICAOF", "NO", "ONE")


def cut(servers: list[redis.Redis]) -> None:
    for server in servers:
        server.client_kill_filter(_type="normal", skipme=True)


@contextlib.contextmanager
def out_of_connections(site: Site) -> Iterator[None]:
    servers = site.both
    for server in servers:
        server.config_set("maxclients", 1)
    cut(servers)
    yield
    for server in servers:
        server.config_set("maxclients", 10_000)


@contextlib.contextmanager
def out_of_descriptors(site: Site) -> Iterator[None]:
    pid = site.model.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))
    cut(site.both)
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def without_queues(site: Site) -> Iterator[None]:
    """The broker is away, and the results are not."""
    site.queues.kill()
    yield
    site.queues.start()


FAULTS = [full, without_replicas, read_only, out_of_connections, out_of_descriptors, without_queues]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_result_link_or_ack_of_a_job_is_lost(site: Site, fault: Callable[[Site], Any]) -> None:
    producer, tag = site.producer, f"{fault.__name__}-{time.monotonic()}"

    def keep(name: str) -> Any:
        return producer.shop("keep", tag, immutable=True).set(task_id=f"{tag}-{name}")

    # In three waves, so that jobs start, wait and end when the fault comes.
    sent: list[AsyncResult] = []
    failing: list[AsyncResult] = []
    for wave, tokens in enumerate((5, 25, 50)):
        for number in range(COUNT // 3):
            name = f"{wave}-{number}"
            sent.append(producer.complete(tokens=tokens).apply_async(link=keep(f"link-{name}")))
            failing.append(producer.show(site.nowhere).apply_async(link_error=keep(f"error-{name}")))
            (producer.complete(tokens=tokens) | keep(f"chain-{name}")).apply_async()
        header = group(producer.complete(tokens=tokens) for _ in range(4))
        chord(header, keep(f"chord-{wave}"), app=producer.app).apply_async()
    eventually(lambda: sent[0].state == "SUCCESS")
    with fault(site):
        time.sleep(FAULT_S)
    assert [job.get(timeout=PATIENCE_S)["finish_reason"] for job in sent] == ["length"] * len(sent)
    codes = [job.get(timeout=PATIENCE_S, propagate=False).args[0] for job in failing]
    assert codes == ["image_unreachable"] * len(failing)
    names = {
        f"{tag}-{kind}-{wave}-{n}"
        for kind in ("link", "error", "chain")
        for wave in range(3)
        for n in range(COUNT // 3)
    }
    names |= {f"{tag}-chord-{wave}" for wave in range(3)}
    eventually(lambda: names <= arrived(site), 2 * PATIENCE_S)
    with site.queues.broker().connect() as server:
        eventually(
            lambda: producer.queued() == server.hlen("unacked") == server.zcard("unacked_index") == 0, 2 * PATIENCE_S
        )
    assert site.worker.poll() is None


def arrived(site: Site) -> set[str]:
    """Ids of what was sent to the web backend's queue, which nobody reads."""
    with site.queues.broker().connect() as server:
        lists = [key for key in server.keys("shop*") if server.type(key) == b"list"]
        raw = [json.loads(message) for key in lists for message in server.lrange(key, 0, -1)]
    return {message["headers"]["id"] for message in raw}


# Connections


def test_a_busy_worker_has_few_connections(site: Site) -> None:
    jobs = group(site.producer.complete(tokens=20) for _ in range(300)).apply_async()
    # The producer's own, and this test's.
    others = [len(ours(server)) for server in site.both]
    # Its clients close none, so all that it ever needed is there at the end.
    jobs.get(timeout=PATIENCE_S)
    held = [len(server.client_list()) - other for server, other in zip(site.both, others, strict=True)]
    assert max(held) <= MOST_CONNECTIONS, held


def ours(server: redis.Redis) -> list[Any]:
    """Connections of this very process."""
    ports = {connection.laddr.port for connection in psutil.Process().net_connections("tcp") if connection.laddr}
    return [client for client in server.client_list() if int(client["addr"].rpartition(":")[2]) in ports]


def test_all_jobs_end_well_with_few_clients_and_descriptors(site: Site) -> None:
    pids = site.worker.pid, site.model.pid
    limits = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids]
    with configured(site, "maxclients", 100, 10_000):
        for pid, (_, hard) in zip(pids, limits, strict=True):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, hard))
        cut(site.both)
        jobs = [site.producer.complete(f"word-{n}", tokens=10).apply_async() for n in range(200)]
        assert [job.get(timeout=PATIENCE_S)["text"] for job in jobs] == [f"word-{n}"[-10:] for n in range(200)]
        for pid, limit in zip(pids, limits, strict=True):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
