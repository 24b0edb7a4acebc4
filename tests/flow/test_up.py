"""`make up`: one command leaves a broker and a worker running, and Ctrl-C ends what it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tasks import Caption, Client, ImagePath
from tests.flow.conftest import PATIENCE_S
from worker.demo import stack

pytestmark = pytest.mark.timeout(120)


@contextmanager
def up(port: int) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    command = [sys.executable, "-m", "worker.demo.up", "--port", str(port)]
    process = subprocess.Popen(command, cwd=stack.CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Ready"):
                break
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def interrupted(process: subprocess.Popen[str]) -> int:
    """Its exit status after Ctrl-C, with nothing of it left."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    status = process.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []
    return status


def test_a_broker_and_a_worker_run_until_ctrl_c() -> None:
    port = stack.free_port()
    with up(port) as process:
        job = Client(f"redis://localhost:{port}/0").submit(Caption(image=ImagePath(path="cat.png")))
        assert job.result(timeout=60).text.strip() == "A cat on a blue background."
        assert interrupted(process) == 0
    assert not is_listening(port)


def test_a_redis_that_is_there_is_used_and_left() -> None:
    with stack.broker() as server:
        with up(server.port) as process:
            job = Client(server.url).submit(Caption(image=ImagePath(path="duck.png")))
            assert "duck" in job.result(timeout=60).text
            assert interrupted(process) == 0
        assert server.connect().ping()
