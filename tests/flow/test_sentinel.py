"""Queues and results behind real sentinels: the primary is killed, its replica takes over, and all jobs end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from redis.sentinel import Sentinel

from tasks import Client, Complete
from tests.support.waiting import eventually
from worker.demo import stack

MASTER = "models"
#: Of the servers, and of the sentinels.
PASSWORD, SENTINEL_PASSWORD = "p:w/of#servers", "of-sentinels"
#: Seconds for a failover and for what follows from it.
FAILOVER_S = 60.0


@dataclass
class Site:
    """A primary, a replica and three sentinels."""

    primary: subprocess.Popen[bytes]
    ports: list[int]
    sentinels: list[int]

    def url(self, database: int) -> str:
        """As people write it: the password and the database stand once."""
        first, *others = (f"127.0.0.1:{port}" for port in self.sentinels)
        listed = [f"sentinel://:{PASSWORD.replace('/', '%2F').replace('#', '%23')}@{first}"]
        listed += [f"sentinel://{other}" for other in others]
        return ";".join(listed) + f"/{database}"

    def connect(self, number: int) -> redis.Redis:
        return redis.Redis(port=self.ports[number], password=PASSWORD)

    def primary_port(self) -> int:
        asked = Sentinel(
            [("127.0.0.1", port) for port in self.sentinels], sentinel_kwargs={"password": SENTINEL_PASSWORD}
        )
        with contextlib.suppress(redis.ConnectionError):
            return int(asked.discover_master(MASTER)[1])
        return 0


@contextlib.contextmanager
def _server(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir()
    with stack.started([stack.server_binary(), *options, "--dir", str(folder)], log=folder / "log") as process:
        yield process


def _sentinel_conf(folder: Path, port: int, primary: int) -> Path:
    """A sentinel writes what it learns into this file."""
    file = folder / f"sentinel-{port}.conf"
    file.write_text(
        f"""port {port}
bind 127.0.0.1
requirepass {SENTINEL_PASSWORD}
sentinel sentinel-pass {SENTINEL_PASSWORD}
sentinel monitor {MASTER} 127.0.0.1 {primary} 2
sentinel auth-pass {MASTER} {PASSWORD}
sentinel down-after-milliseconds {MASTER} 1000
sentinel failover-timeout {MASTER} 10000
"""
    )
    return file


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    ports, sentinels = ([stack.free_port() for _ in range(number)] for number in (2, 3))
    common = ["--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD, "--masterauth", PASSWORD]
    common += ["--repl-diskless-sync-delay", "0"]
    with ExitStack() as started:
        primary = started.enter_context(_server(tmp_path / "primary", "--port", str(ports[0]), *common))
        replication = ["--replicaof", "127.0.0.1", str(ports[0])]
        started.enter_context(_server(tmp_path / "replica", "--port", str(ports[1]), *common, *replication))
        for port in sentinels:
            conf = _sentinel_conf(tmp_path, port, ports[0])
            folder = tmp_path / f"sentinel-{port}"
            folder.mkdir()
            command = [stack.server_binary(), str(conf), "--sentinel"]
            started.enter_context(stack.started(command, log=folder / "log"))
        site = Site(primary, ports, sentinels)
        eventually(lambda: _answers(site), FAILOVER_S)
        yield site


def _answers(site: Site) -> bool:
    """The replica follows, and each sentinel knows the others and it."""
    with contextlib.suppress(redis.RedisError):
        follows = site.connect(1).info("replication")["master_link_status"] == "up"
        for port in site.sentinels:
            known = redis.Redis(port=port, password=SENTINEL_PASSWORD).sentinel_master(MASTER)
            follows = follows and known["num-other-sentinels"] == 2 and known["num-slaves"] == 1
        return follows
    return False


@contextlib.contextmanager
def _worker(module: str, log: Path, settings: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {f"IDEFICS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "celery", "-A", module, "worker", "--hostname", f"{log.name}@%h"]
    with stack.started(command, log=log, environment=environment) as process:
        stack.await_line(process, log, " ready.", stack.WORKER_START_S)
        yield process


def test_all_jobs_end_when_the_primary_is_killed(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = {"BROKER_URL": site.url(0), "RESULT_BACKEND": site.url(1)}
    urls |= {"SENTINEL_MASTER": MASTER, "SENTINEL_PASSWORD": SENTINEL_PASSWORD}
    for name, value in urls.items():
        monkeypatch.setenv(f"IDEFICS_{name}", value)
    settings = {**urls, "MODEL": "fake:0.05", "PREFETCH": "4", "VISIBILITY_TIMEOUT_S": "10"}
    with (
        _worker("worker.app", tmp_path / "gpu", settings) as worker,
        _worker("worker.callbacks", tmp_path / "callbacks", urls) as callbacks,
    ):
        client = Client()
        jobs = client.submit_many(Complete(prompt=[f"word-{n}"], max_new_tokens=6) for n in range(40))
        assert jobs[0].result(FAILOVER_S).text == "word-0"
        # What no replica has yet dies with its primary: Redis replicates after it has answered.
        site.connect(0).wait(1, 5_000)
        site.primary.kill()
        eventually(lambda: site.primary_port() == site.ports[1], FAILOVER_S)
        assert [job.result(FAILOVER_S).text for job in jobs] == [f"word-{n}"[-6:] for n in range(40)]
        later = client.submit(Complete(prompt=["Hello"], max_new_tokens=3), priority=0)
        assert later.result(FAILOVER_S).text == "llo"
        new = site.connect(1)
        eventually(lambda: new.hlen("unacked") == 0, FAILOVER_S)
        for process in (worker, callbacks):
            assert process.poll() is None
            asked = time.monotonic()
            process.terminate()
            assert process.wait(20) == 0
            assert time.monotonic() - asked < 5
    said = (tmp_path / "gpu").read_text() + (tmp_path / "callbacks").read_text()
    assert PASSWORD not in said
    assert SENTINEL_PASSWORD not in said


def test_a_sentinel_without_its_password_is_named_and_waited_for(site: Site, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": f"{site.url(0)}?master_name={MASTER}", "IDEFICS_MODEL": "fake"}
    environment |= {"IDEFICS_RESULT_BACKEND": f"{site.url(1)}?master_name={MASTER}"}
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    with stack.started(command, log=tmp_path / "log", environment=environment) as process:
        eventually(lambda: "No master found" in (tmp_path / "log").read_text(), FAILOVER_S)
        process.terminate()
        assert process.wait(20) == 0
    assert PASSWORD not in (tmp_path / "log").read_text()
