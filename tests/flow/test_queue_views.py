"""A thousand jobs in four priorities: every tool that an operator has tells their number, by a user's rights."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from tasks import Client, Complete
from tasks.cli import main
from tests.support.guarded import as_user, make_secrets
from tests.support.waiting import PATIENCE_S
from worker.demo import stack

pytestmark = pytest.mark.timeout(120)

#: Jobs by priority.
JOBS = {0: 100, 3: 200, 5: 300, 9: 400}


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


@pytest.mark.parametrize("user", ["producer", "worker", "monitor", "exporter"])
def test_top_counts_them_all(server: stack.Broker, secrets: Path, user: str) -> None:
    servers = as_user(server, secrets, user)
    outcome = CliRunner().invoke(
        main, ["--broker", servers.url, "--results", servers.results, "top", "--once", "--json"]
    )
    found = json.loads(outcome.stdout)
    (queue,) = found["queues"]
    assert queue["by_priority"] == {str(priority): JOBS.get(priority, 0) for priority in range(10)}
    assert queue["waiting"] == sum(JOBS.values())
    # The others may look at no message.
    assert (queue["oldest_age_s"] is not None) == (user in ("worker", "exporter"))
    assert (found["in_flight"] is not None) == (user != "producer")
    assert found["workers"] == {}


def test_the_exporter_counts_them_all(server: stack.Broker, secrets: Path, tmp_path: Path) -> None:
    user, port = as_user(server, secrets, "exporter"), stack.free_port()
    environment = {
        **os.environ,
        "IDEFICS_BROKER_URL": user.url,
        "IDEFICS_RESULT_BACKEND": user.results,
        "IDEFICS_QUEUE_METRICS_ADDRESS": f"127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "worker.observability.queue"]
    with stack.started(command, log=tmp_path / "log", environment=environment) as process:
        stack.await_line(process, tmp_path / "log", "/metrics", PATIENCE_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    found = {sample.labels["priority"]: sample.value for sample in families["idefics_queue_jobs"].samples}
    assert found == {str(priority): JOBS.get(priority, 0) for priority in range(10)}
    (waiting,) = families["idefics_queue_jobs_waiting"].samples
    assert waiting.value == sum(JOBS.values())
    (age,) = families["idefics_queue_oldest_job_age_seconds"].samples
    assert 0 < age.value < 60
