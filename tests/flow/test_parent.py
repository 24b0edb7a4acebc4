"""A worker's two processes: Celery's parent, the model process, and nothing else, nor after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.gallery import Gallery
from tests.support.stand import Stand, stand
from tests.support.waiting import PATIENCE_S, SOON_S, eventually
from worker.demo import stack


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server:
        yield server


@pytest.fixture(scope="module")
def gallery() -> Iterator[Gallery]:
    with Gallery().open() as gallery:
        yield gallery


@pytest.fixture
def stood(server: stack.Broker, gallery: Gallery, tmp_path: Path) -> Iterator[Stand]:
    with stand(server, gallery, tmp_path / "log") as stood:
        yield stood


def test_a_worker_takes_as_many_jobs_as_it_has_places_for_at_any_concurrency(
    server: stack.Broker, gallery: Gallery, tmp_path: Path
) -> None:
    with stand(server, gallery, tmp_path / "log", "--concurrency", "4", PREFETCH="6") as stood:
        assert stood.producer.stats()["prefetch_count"] == 6


def test_the_parent_has_one_child_and_that_has_none(held_up: Stand) -> None:
    parent = psutil.Process(held_up.process.pid)
    assert [child.pid for child in parent.children(recursive=True)] == [held_up.producer.model_process()]


def test_a_replaced_model_process_leaves_no_zombie(held_up: Stand) -> None:
    parent = psutil.Process(held_up.process.pid)
    (first,) = parent.children()
    first.kill()
    held_up.producer.complete().apply_async().get(timeout=PATIENCE_S)
    (second,) = parent.children(recursive=True)
    assert second.pid != first.pid
    assert second.status() != psutil.STATUS_ZOMBIE


def test_nothing_is_left_running_after_sigterm(stood: Stand) -> None:
    processes = _tree(stood)
    stood.process.send_signal(signal.SIGTERM)
    assert stood.process.wait(PATIENCE_S) == 0
    assert _left(processes) == []


def test_nothing_is_left_running_after_the_parent_was_killed(stood: Stand) -> None:
    processes = _tree(stood)
    stood.process.kill()
    stood.process.wait(PATIENCE_S)
    assert _left(processes) == []


def test_a_worker_that_is_stopped_while_it_loads_leaves_nothing(server: stack.Broker, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["celery", "-A", "worker.app", "worker"]
    environment = {**os.environ, **_addresses(server), "IDEFICS_MODEL": "fake"}
    with stack.started(_ours(command), log=log, environment=environment) as process:
        stack.await_line(process, log, "Loading fake in a model process.", PATIENCE_S)
        processes = [psutil.Process(process.pid), *_eventual_children(process)]
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        assert _left(processes) == []
    assert "The model is ready" not in log.read_text()


def test_a_worker_whose_model_cannot_be_loaded_says_why_and_exits(server: stack.Broker, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, **_addresses(server), "IDEFICS_MODEL": str(tmp_path)}
    with stack.started(_ours(["celery", "-A", "worker.app", "worker"]), log=log, environment=environment) as process:
        assert process.wait(PATIENCE_S) not in (0, -signal.SIGKILL)
    assert "The model cannot be served" in log.read_text()


def _tree(stood: Stand) -> list[psutil.Process]:
    parent = psutil.Process(stood.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    assert len(processes) == 2
    return processes


def _eventual_children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    eventually(parent.children)
    return parent.children(recursive=True)


def _left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run, given a moment."""
    return list(psutil.wait_procs(processes, timeout=SOON_S)[1])


def _addresses(server: stack.Broker) -> dict[str, str]:
    return {"IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}


def _ours(command: list[str]) -> list[str]:
    """The command by this virtual environment's programs."""
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


def test_a_busy_worker_tells_the_others_its_load(held_up: Stand) -> None:
    shown = uuid.uuid4().hex
    job = held_up.producer.show(held_up.gallery.held(shown)).apply_async()
    eventually(lambda: held_up.producer.server.connect().hlen("idefics:load:idefics") == 1)
    held_up.gallery.release(shown)
    job.get(timeout=PATIENCE_S)
