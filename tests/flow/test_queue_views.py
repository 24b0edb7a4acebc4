"""A thousand jobs in four priorities: each of the operator's tools counts them, with the rights of its Redis user."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from config.settings import Settings
from tasks import Client, Complete
from tasks.cli import main
from tests.support.guarded import as_user, environment, make_secrets, tls_proxy
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.observability.queue import QueueCollector, exporter_app

#: Jobs by priority.
JOBS = {0: 10, 3: 20, 5: 30, 9: 40}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_secrets(tmp_path_factory.mktemp("views") / "secrets")


@pytest.fixture(scope="module")
def server(secrets: Path) -> Iterator[stack.Broker]:
    """Redis with our users, in which the jobs wait and no worker lives."""
    with stack.broker("--aclfile", str(secrets / "redis" / "users.acl")) as server:
        client = Client(as_user(server, secrets, "producer").url)
        for priority, count in JOBS.items():
            for _ in range(count):
                client.submit(Complete(prompt=["Hello"]), priority=priority)
        yield server


def _top(user: stack.Broker) -> dict[str, Any]:
    outcome = CliRunner().invoke(main, ["--broker", user.url, "--results", user.results, "top", "--once", "--json"])
    return dict(json.loads(outcome.stdout))


@pytest.mark.parametrize("user", ["producer", "worker", "monitor", "exporter"])
def test_top_counts_them_all(server: stack.Broker, secrets: Path, user: str) -> None:
    found = _top(as_user(server, secrets, user))
    (queue,) = found["queues"]
    assert queue["by_priority"] == {str(priority): JOBS.get(priority, 0) for priority in range(10)}
    assert queue["waiting"] == sum(JOBS.values())
    # The others may look at no message.
    assert (queue["oldest_age_s"] is not None) == (user in ("worker", "exporter"))
    assert (found["in_flight"] is not None) == (user != "producer")
    assert found["workers"] == {}


def test_the_exporter_counts_them_all(server: stack.Broker, secrets: Path, tmp_path: Path) -> None:
    user, port = as_user(server, secrets, "exporter"), stack.free_port()
    variables = {
        **os.environ,
        "IDEFICS_BROKER_URL": user.url,
        "IDEFICS_RESULT_BACKEND": user.results,
        "IDEFICS_QUEUE_METRICS_ADDRESS": f"127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "worker.observability.queue"]
    with stack.started(command, log=tmp_path / "log", environment=variables) as process:
        stack.await_line(process, tmp_path / "log", "/metrics", PATIENCE_S)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    found = {sample.labels["priority"]: sample.value for sample in families["idefics_queue_jobs"].samples}
    assert found == {str(priority): JOBS.get(priority, 0) for priority in range(10)}
    (waiting,) = families["idefics_queue_jobs_waiting"].samples
    assert waiting.value == sum(JOBS.values())
    (age,) = families["idefics_queue_oldest_job_age_seconds"].samples
    assert 0 < age.value < 3_600


def test_flower_counts_them_all_and_shows_how_they_end(server: stack.Broker, secrets: Path, tmp_path: Path) -> None:
    client = Client(as_user(server, secrets, "producer").url)
    with _flower(server, secrets, tmp_path / "flower") as flower, _events(server, secrets, tmp_path / "events"):
        assert flower.get("/api/queues/length") == {
            "active_queues": [{"name": "idefics", "messages": sum(JOBS.values())}]
        }
        failed = client.submit(Complete(prompt=["Hello"], max_new_tokens=5_000), priority=0)
        canceled = client.submit(Complete(prompt=["Hello"]), priority=9)
        canceled.cancel()
        # Flower knows a job from its worker's first event on.
        settings = {"MODEL": "fake", "PREFETCH": "64"}
        with stack.worker(as_user(server, secrets, "worker"), settings=settings, log=tmp_path / "worker"):
            ended = {"SUCCESS": sum(JOBS.values()), "FAILURE": 1, "REVOKED": 1}
            eventually(lambda: flower.states() == ended)
            (worker,) = flower.get("/workers?json=1")["data"]
            _await_the_end_in_top_and_exporter(server, secrets)
        assert worker["task-succeeded"] == ended["SUCCESS"]
        tasks = flower.tasks()
        assert (tasks[failed.id]["state"], tasks[canceled.id]["state"]) == ("FAILURE", "REVOKED")
        assert {task["name"] for task in tasks.values()} == {"idefics.complete"}
        assert flower.get("/api/queues/length") == {"active_queues": [{"name": "idefics", "messages": 0}]}
        for login in ("", "flower:guess"):
            with pytest.raises(HTTPError, match="401"):
                flower.get("/api/tasks", login)
    assert "Hello" not in json.dumps(tasks)
    events = (tmp_path / "events").read_text()
    assert events.count("task succeeded: idefics.complete(") == ended["SUCCESS"]
    assert "Hello" not in events
    assert not [line for line in (tmp_path / "flower").read_text().splitlines() if line.startswith("[E")]


@contextmanager
def _events(server: stack.Broker, secrets: Path, log: Path) -> Iterator[None]:
    """`celery events`, which docs/monitoring.md names."""
    user = as_user(server, secrets, "monitor")
    command = [sys.executable, "-u", "-m", "celery", "-A", "worker.monitor", "events", "--dump"]
    urls = {"IDEFICS_BROKER_URL": user.url, "IDEFICS_RESULT_BACKEND": user.results}
    with stack.started(command, log=log, environment={**os.environ, **urls}) as process:
        stack.await_line(process, log, "starting capture", PATIENCE_S)
        yield


def _await_the_end_in_top_and_exporter(server: stack.Broker, secrets: Path) -> None:
    """The worker renews its numbers every five seconds."""
    exporter = as_user(server, secrets, "exporter")

    def has_ended() -> bool:
        found = _top(exporter)
        (status,) = found["workers"].values()
        is_idle = status is not None and (status["jobs"], status["tokens_per_s"] > 0) == (0, True)
        return is_idle and found["failures"] == {"invalid_request": 1}

    eventually(has_ended)
    found = _top(exporter)
    (status,) = found["workers"].values()
    assert (status["state"], status["jobs"], status["max_rows"]) == ("ready", 0, 64)
    assert found["jobs_per_s"] == status["jobs_per_s"] > 0
    registry = CollectorRegistry()
    settings = Settings(broker_url=exporter.url, result_backend=exporter.results)
    registry.register(QueueCollector(exporter_app(settings), "idefics"))
    queue = {"queue": "idefics"}
    assert registry.get_sample_value("idefics_queue_jobs_waiting", queue) == 0
    assert registry.get_sample_value("idefics_queue_oldest_job_age_seconds", queue) == 0
    assert registry.get_sample_value("idefics_queue_workers", queue) == 1
    assert registry.get_sample_value("idefics_queue_jobs_in_flight") == 0
    assert registry.get_sample_value("idefics_queue_dead_letters") == 1


@dataclass(frozen=True, slots=True)
class Flower:
    port: int
    login: str

    def get(self, path: str, login: str | None = None) -> Any:
        credentials = base64.b64encode((self.login if login is None else login).encode()).decode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Basic {credentials}"})
        with urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def tasks(self) -> dict[str, Any]:
        return dict(self.get("/api/tasks?limit=5000"))

    def states(self) -> Counter[str]:
        return Counter(task["state"] for task in self.tasks().values())


@contextmanager
def _flower(server: stack.Broker, secrets: Path, log: Path) -> Iterator[Flower]:
    """Flower by docker-compose.yml's command, with TLS and the login that secrets.sh made."""
    service = yaml.safe_load((stack.CHECKOUT / "docker-compose.yml").read_text())["services"]["flower"]
    assert [file["path"] for file in service["env_file"]] == ["secrets/monitor/env", "secrets/flower/env", ".env"]
    name, _, login = (secrets / "flower" / "env").read_text().strip().partition("=")
    program, *arguments = service["command"]
    port = stack.free_port()
    command = [str(Path(sys.executable).parent / program), *arguments, f"--port={port}", "--address=127.0.0.1"]
    with tls_proxy(server.port, secrets) as encrypted:
        urls = {
            key: url.replace("@redis:6379", f"@localhost:{encrypted}")
            for key, url in environment(secrets, "monitor").items()
        }
        variables = {**os.environ, **urls, name: login, "PYTHONUNBUFFERED": "1"}
        with stack.started(command, log=log, environment=variables) as process:
            # It has subscribed to the events.
            stack.await_line(process, log, "Connected to rediss://monitor:**@", PATIENCE_S)
            yield Flower(port, login)
