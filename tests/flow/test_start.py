"""A worker's start: both Redis are asked before it is ready, and what cannot work is refused with the cure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks import Client, Complete
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack


@contextmanager
def _worker(folder: Path, broker: str, results: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": broker, "IDEFICS_RESULT_BACKEND": results, "IDEFICS_MODEL": "fake"}
    environment |= {"IDEFICS_STATE_FILE": str(folder / "state")}
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", *arguments]
    with stack.started(command, log=folder / "log", environment=environment) as process:
        yield process


def _state(folder: Path) -> tuple[str, str]:
    file = folder / "state"
    said = json.loads(file.read_text()) if file.exists() else {"state": "", "reason": ""}
    return said["state"], said["reason"]


@pytest.mark.parametrize("missing", ["broker", "results"])
def test_a_redis_that_is_not_there_yet_is_named_and_waited_for(
    broker: stack.Broker, tmp_path: Path, missing: str
) -> None:
    port = stack.free_port()
    away = f"redis://127.0.0.1:{port}/1"
    urls = (away, broker.results) if missing == "broker" else (broker.url, away)
    setting = "IDEFICS_BROKER_URL" if missing == "broker" else "IDEFICS_RESULT_BACKEND"
    with _worker(tmp_path, *urls) as process:
        eventually(lambda: setting in _state(tmp_path)[1])
        assert _state(tmp_path)[0] == "STARTING"
        assert f"{port}" in _state(tmp_path)[1]
        assert " ready." not in (tmp_path / "log").read_text()
        with stack.broker(port=port):
            stack.await_line(process, tmp_path / "log", " ready.", stack.WORKER_START_S)
            eventually(lambda: _state(tmp_path)[0] == "READY")


def test_sigterm_ends_a_start_that_waits_for_redis(broker: stack.Broker, tmp_path: Path) -> None:
    with _worker(tmp_path, broker.url, f"redis://127.0.0.1:{stack.free_port()}/1") as process:
        eventually(lambda: "does not answer" in (tmp_path / "log").read_text())
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        assert time.monotonic() - asked < 10
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("broker_path", "results_path", "names", "cure"),
    [
        ("/0", "/16", "IDEFICS_RESULT_BACKEND", "lower one"),
        ("/99", "/1", "IDEFICS_BROKER_URL", "lower one"),
    ],
)
def test_a_redis_that_will_never_do_ends_the_start_with_the_cure(
    broker: stack.Broker, tmp_path: Path, broker_path: str, results_path: str, names: str, cure: str
) -> None:
    base = f"redis://127.0.0.1:{broker.port}"
    with _worker(tmp_path, base + broker_path, base + results_path) as process:
        assert process.wait(PATIENCE_S) != 0
    state, reason = _state(tmp_path)
    assert state == "SETUP_FAILED"
    assert names in reason
    assert cure in reason
    assert reason in (tmp_path / "log").read_text()


def test_a_callbacks_worker_whose_redis_will_never_do_ends_with_the_cure(broker: stack.Broker, tmp_path: Path) -> None:
    with _callbacks_worker(tmp_path, f"redis://127.0.0.1:{broker.port}/99") as process:
        assert process.wait(PATIENCE_S) != 0
    log = (tmp_path / "log").read_text()
    assert re.search("IDEFICS_BROKER_URL .*use a lower one.*The worker stops", log)
    assert "Traceback" not in log


def test_a_callbacks_worker_waits_for_a_redis_that_is_not_there_yet(tmp_path: Path) -> None:
    port = stack.free_port()
    with _callbacks_worker(tmp_path, f"redis://127.0.0.1:{port}/0") as process:
        eventually(lambda: "the worker waits for it" in (tmp_path / "log").read_text())
        with stack.broker(port=port):
            stack.await_line(process, tmp_path / "log", " ready.", PATIENCE_S)
    with _callbacks_worker(tmp_path, f"redis://127.0.0.1:{port}/0") as process:
        eventually(lambda: (tmp_path / "log").read_text().count("the worker waits for it") == 2)
        process.terminate()
        process.wait(PATIENCE_S / 2)


@contextmanager
def _callbacks_worker(folder: Path, broker: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": broker}
    command = [sys.executable, "-m", "celery", "-A", "worker.callbacks", "worker"]
    with stack.started(command, log=folder / "log", environment=environment) as process:
        yield process


def test_a_wrong_password_ends_the_start_and_is_not_repeated(tmp_path: Path) -> None:
    with stack.broker("--requirepass", "right") as server:
        address = f"127.0.0.1:{server.port}"
        with _worker(tmp_path, f"redis://:right@{address}/0", f"redis://:s3cr3t@{address}/1") as process:
            assert process.wait(PATIENCE_S) != 0
    state, reason = _state(tmp_path)
    assert state == "SETUP_FAILED"
    assert "IDEFICS_RESULT_BACKEND" in reason
    assert "s3cr3t" not in reason + (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["-P", "threads"], "without -P"),
        (["--pool=solo"], "without -P"),
        (["--autoscale", "4,1"], "without --autoscale"),
    ],
)
def test_another_pool_is_refused(broker: stack.Broker, tmp_path: Path, arguments: list[str], cure: str) -> None:
    with _worker(tmp_path, broker.url, broker.results, *arguments) as process:
        assert process.wait(PATIENCE_S) != 0
    said = (tmp_path / "log").read_text()
    assert cure in said
    assert "Traceback" not in said


def test_a_redis_socket_serves_queues_and_results(tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    with stack.broker("--unixsocket", str(socket)):
        urls = f"redis+socket://{socket}", f"socket://{socket}?virtual_host=1"
        with _worker(tmp_path, *urls) as process:
            stack.await_line(process, tmp_path / "log", " ready.", stack.WORKER_START_S)
            client = Client(urls[0], result_backend=urls[1])
            job = client.submit(Complete(prompt=["Hello"], max_new_tokens=3), priority=2)
            assert job.result(PATIENCE_S).text == "llo"


def test_queues_and_results_may_share_one_database(tmp_path: Path) -> None:
    with stack.broker("--databases", "1") as server, _worker(tmp_path, server.url, server.url) as process:
        stack.await_line(process, tmp_path / "log", " ready.", stack.WORKER_START_S)
        client = Client(server.url, result_backend=server.url)
        hello = Complete(prompt=["Hello"], max_new_tokens=3, idempotency_key="once")
        jobs = client.submit_many([hello, *(Complete(prompt=["Hello"], max_new_tokens=3) for _ in range(20))])
        assert {job.result(PATIENCE_S).text for job in jobs} == {"llo"}
        assert client.submit(hello).id == jobs[0].id
        assert client.queued() == 0
        with server.connect() as redis:
            eventually(lambda: redis.hlen("unacked") == 0)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("BROKER_URL", "app"),
        ("RESULT_BACKEND", "app"),
        ("CELERY_BROKER_URL", "app"),
        ("CELERY_RESULT_BACKEND", "app"),
        ("CELERY_BROKER_URL", "callbacks"),
    ],
)
def test_a_variable_of_the_sites_own_celery_does_not_lead_a_worker_elsewhere(
    broker: stack.Broker, tmp_path: Path, name: str, module: str
) -> None:
    environment = {**os.environ, "IDEFICS_BROKER_URL": broker.url, "IDEFICS_RESULT_BACKEND": broker.results}
    environment |= {"IDEFICS_MODEL": "fake", name: "redis://elsewhere:6379/3"}
    command = [sys.executable, "-m", "celery", "-A", f"worker.{module}", "worker"]
    ended = subprocess.run(
        command, cwd=stack.CHECKOUT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 1
    assert f"IDEFICS_{name.removeprefix('CELERY_')} only" in ended.stderr
    assert "elsewhere" not in ended.stderr


def test_a_variable_that_says_the_same_changes_nothing(
    broker: stack.Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_URL", broker.url)
    monkeypatch.setenv("RESULT_BACKEND", broker.results)
    with stack.worker(broker, settings={"MODEL": "fake"}):
        assert Client(broker.url).submit(Complete(prompt=["Hello"])).result(timeout=PATIENCE_S).text
