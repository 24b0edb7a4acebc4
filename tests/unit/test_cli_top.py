"""`idefics-jobs top` on a real Redis, in which workers are registered that the tests made up."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click
import pytest
from click.testing import CliRunner
from click.testing import Result as Outcome

from tasks import Client, Complete
from tasks.cli import main
from tasks.worker_registry import deregister, register, status_key
from tasks.worker_status import WorkerStatus
from tests.support.waiting import eventually
from worker.demo.stack import CHECKOUT, Broker

BUSY = WorkerStatus(
    state="busy",
    model="demo",
    jobs=12,
    rows=3,
    max_rows=4,
    jobs_per_s=2.5,
    tokens_per_s=80.0,
    failures={"image_unreachable": 3, "invalid_request": 1},
)
IDLE = WorkerStatus(state="ready", model="demo", max_rows=4, failures={"invalid_request": 4})


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    client = Client(broker.url)
    client.app.amqp.queues.add("idefics")
    client.app.amqp.queues.select("idefics")
    yield client
    broker.connect().flushdb()


def run(broker: Broker, *arguments: str) -> Outcome:
    return CliRunner().invoke(main, ["--broker", broker.url, "top", *arguments])


def shown(broker: Broker) -> dict[str, Any]:
    outcome = run(broker, "--once", "--json")
    assert outcome.exit_code == 0, outcome.output
    (line,) = outcome.stdout.splitlines()
    return dict(json.loads(line))


def enter(client: Client, broker: Broker, name: str, status: WorkerStatus | None) -> None:
    register(client.app, name, "demo", broker.connect(), status)


def test_queues_workers_and_their_sums_are_one_json_line(broker: Broker, client: Client) -> None:
    for priority in (0, 3, 3):
        client.submit(Complete(prompt=["Hello"]), priority=priority)
    enter(client, broker, "gpu0@here", BUSY)
    enter(client, broker, "gpu1@here", IDLE)
    enter(client, broker, "old@here", None)
    found = shown(broker)
    (queue,) = found["queues"]
    assert (queue["queue"], queue["waiting"], queue["models"]) == ("idefics", 3, ["demo"])
    assert {priority: count for priority, count in queue["by_priority"].items() if count} == {"0": 1, "3": 2}
    assert found["workers"] == {"gpu0@here": asdict(BUSY), "gpu1@here": asdict(IDLE), "old@here": None}
    assert (found["in_flight"], found["jobs_per_s"], found["tokens_per_s"]) == (0, 2.5, 80.0)
    # The most frequent first.
    assert list(found["failures"].items()) == [("invalid_request", 5), ("image_unreachable", 3)]


def test_without_a_terminal_it_prints_lines_once(broker: Broker, client: Client) -> None:
    client.submit(Complete(prompt=["Hello"]), priority=9)
    enter(client, broker, "gpu0@here", BUSY)
    queue, worker, sums = run(broker).stdout.splitlines()
    assert queue.split("\t")[:4] == ["queue", "idefics", "1", "9: 1"]
    assert worker.split("\t") == ["worker", "gpu0@here", "busy", "demo", "3/4", "12", "2.5", "80", "4"]
    assert sums == (
        "in flight: 0; jobs/s: 2.5; tokens/s: 80; failed in the last 5 minutes: 3 image_unreachable, 1 invalid_request"
    )


def test_a_worker_that_leaves_is_gone_with_its_status(broker: Broker, client: Client) -> None:
    enter(client, broker, "gpu0@here", BUSY)
    deregister(client.app, "gpu0@here", broker.connect())
    assert shown(broker)["workers"] == {}
    assert broker.connect().exists(status_key(client.app, "gpu0@here")) == 0


def test_a_status_of_a_newer_worker_is_read(broker: Broker, client: Client) -> None:
    enter(client, broker, "new@here", BUSY)
    newer = json.dumps({**asdict(BUSY), "temperature": 80})
    broker.connect().set(status_key(client.app, "new@here"), newer)
    assert shown(broker)["workers"]["new@here"] == asdict(BUSY)


def _has_output(terminal: int) -> bool:
    """Whether a terminal had output, which is then read."""
    has_output = bool(select.select([terminal], [], [], 0)[0])
    if has_output:
        os.read(terminal, 65_536)
    return has_output


def test_the_screen_is_renewed_until_ctrl_c(broker: Broker, client: Client) -> None:
    enter(client, broker, "gpu0@here", BUSY)
    enter(client, broker, "gpu1\x1b[2J[red]", IDLE)
    terminal, inside = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "tasks", "--broker", broker.url, "top", "--interval", "0.1"]
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdin=inside, stdout=inside, stderr=inside)
    try:
        text = ""
        # The second screen has what came after the first.
        while "busy" not in text:
            text += os.read(terminal, 65_536).decode(errors="replace")
        client.submit(Complete(prompt=["Hello"]), priority=7)
        while "7: 1" not in text:
            text += os.read(terminal, 65_536).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        # Read on: a terminal that is full holds it up.
        eventually(lambda: not _has_output(terminal) and process.poll() is not None)
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(terminal)
        os.close(inside)
    # Neither the terminal nor rich obeys what a name says.
    assert "gpu1\\x1b[2J[red]" in click.unstyle(text)


@pytest.mark.parametrize("arguments", [(), ("--once", "--json")])
def test_a_redis_that_is_away_is_told(arguments: tuple[str, ...]) -> None:
    outcome = CliRunner().invoke(main, ["--broker", "redis://localhost:1/0", "top", *arguments])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("Error: Redis does not answer")
