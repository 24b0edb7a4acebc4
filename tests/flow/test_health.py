"""The probe beside a real worker, through all that can become of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gallery import Gallery
from tests.support.stand import SLOTS, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
def stood(server: stack.Broker, file: Path, tmp_path: Path) -> Iterator[Stand]:
    # Silent for a tenth of this, it is unhealthy.
    settings = {"STATE_FILE": str(file), "HANG_TIMEOUT_S": "20"}
    with Gallery().open() as gallery, stand(server, gallery, tmp_path / "log", **settings) as stood:
        yield stood


def probe(file: Path, kind: str = "--ready") -> tuple[int, str]:
    """Exit status, and the state's name."""
    command = [sys.executable, "-m", "worker.health", kind]
    environment = {**os.environ, "IDEFICS_STATE_FILE": str(file)}
    done = subprocess.run(
        command, cwd=stack.CHECKOUT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    return done.returncode, done.stdout.partition(": ")[2].partition(".")[0].partition(" ")[0]


def test_a_worker_is_ready_busy_unhealthy_while_its_process_hangs_or_is_dead_and_ready_again(
    stood: Stand, file: Path
) -> None:
    eventually(lambda: probe(file) == (0, "READY"))

    names = [f"held-{number}" for number in range(SLOTS)]
    jobs = [stood.producer.show(stood.gallery.held(name)).apply_async() for name in names]
    eventually(lambda: probe(file) == (0, "BUSY"))
    stood.gallery.release()
    for job in jobs:
        job.get(timeout=PATIENCE_S)
    eventually(lambda: probe(file) == (0, "READY"))

    model = stood.producer.model_process()
    os.kill(model, signal.SIGSTOP)
    eventually(lambda: probe(file) == (1, "UNHEALTHY"))
    assert probe(file, "--alive")[0] == 0
    os.kill(model, signal.SIGCONT)
    eventually(lambda: probe(file) == (0, "READY"))

    os.kill(model, signal.SIGKILL)
    eventually(lambda: probe(file) == (1, "UNHEALTHY"))
    assert probe(file, "--alive")[0] == 0
    eventually(lambda: probe(file) == (0, "READY"))

    stood.process.kill()
    stood.process.wait()
    assert probe(file) == (1, "UNHEALTHY")
    assert probe(file, "--alive")[0] == 1


def test_a_worker_whose_model_cannot_be_loaded_says_so_while_and_after_it_ends(
    server: stack.Broker, file: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "IDEFICS_BROKER_URL": server.url,
        "IDEFICS_MODEL": str(tmp_path),
        "IDEFICS_STATE_FILE": str(file),
    }
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    with stack.started(command, log=tmp_path / "log", environment=environment) as process:
        eventually(file.exists)
        assert probe(file)[1] == "STARTING"
        assert process.wait(PATIENCE_S) != 0
    assert probe(file) == (1, "SETUP_FAILED")
    assert probe(file, "--alive")[0] == 1
