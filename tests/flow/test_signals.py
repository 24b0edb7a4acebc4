"""SIGTERM and SIGQUIT are heard whatever Redis does: it is gone, frozen, loads, or answers nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Seconds within which a worker with nothing to do is to be gone.
IDLE_S = 4.0


class Server:
    """A Redis server whose worst moments a test chooses."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, stack.free_port()
        self._impostor: socket.socket | None = None
        self.start()

    def start(self) -> None:
        command = [stack.server_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.broker = stack.Broker(self.port, process=self.process)
        eventually(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(self.broker.connect().ping())
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def load(self) -> None:
        """As a server that reads its file: each command is refused."""
        self.kill()
        self._impostor = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._refuse, daemon=True).start()

    def drop(self) -> None:
        """A host that drops what is sent to it: connections are neither made nor refused."""
        self.kill()
        self._impostor = socket.socket()
        self._impostor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._impostor.bind(("127.0.0.1", self.port))
        self._impostor.listen(0)
        self._fillers = [socket.socket() for _ in range(3)]
        for filler in self._fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))

    def _refuse(self) -> None:
        with contextlib.suppress(OSError):
            while self._impostor is not None:
                connection, _ = self._impostor.accept()
                threading.Thread(target=_say_loading, args=[connection], daemon=True).start()

    def end(self) -> None:
        impostor, self._impostor = self._impostor, None
        if impostor is not None:
            impostor.close()
        self.kill()


def _say_loading(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        while asked := connection.recv(65_536):
            connection.sendall(b"-LOADING Redis is loading the dataset in memory\r\n" * max(1, asked.count(b"*")))


FAULTS: dict[str, Callable[[Server], None]] = {
    "answers": lambda server: None,
    "gone": Server.kill,
    "frozen": Server.freeze,
    "loads": Server.load,
    "drops": Server.drop,
}


#: SIGTERM in each fault. SIGQUIT comes through the same pipe: two faults show that it does.
ENDS = pytest.mark.parametrize(
    ("fault", "number"),
    [*((fault, signal.SIGTERM) for fault in FAULTS), *((fault, signal.SIGQUIT) for fault in ("frozen", "drops"))],
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "data").mkdir()
    server = Server(tmp_path / "data")
    yield server
    server.end()


def _seconds_to_end(process: subprocess.Popen[bytes], number: int) -> float:
    asked = time.monotonic()
    process.send_signal(number)
    process.wait(PATIENCE_S)
    return time.monotonic() - asked


def _worker_settings(folder: Path) -> dict[str, str]:
    return {"MODEL": "fake:0.02", "PREFETCH": "4", "STATE_FILE": str(folder / "state"), "RETRY_BACKOFF_S": "0.1"}


@ENDS
def test_an_idle_worker_ends_at_once(server: Server, tmp_path: Path, fault: str, number: int) -> None:
    with stack.worker(
        server.broker, "--without-mingle", settings=_worker_settings(tmp_path), log=tmp_path / "log"
    ) as process:
        children = _children(process.pid)
        FAULTS[fault](server)
        # In Celery's first tries to connect again, or in a wait for an answer.
        time.sleep(1.5)
        assert _seconds_to_end(process, number) < IDLE_S + 0.5
    assert not (tmp_path / "state").exists()
    assert children
    eventually(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@pytest.mark.parametrize("fault", ["gone", "frozen"])
def test_sigquit_ends_a_busy_worker_within_its_timeout(server: Server, tmp_path: Path, fault: str) -> None:
    settings = {**_worker_settings(tmp_path), "MODEL": "fake:0.5", "SOFT_SHUTDOWN_TIMEOUT_S": "2"}
    with stack.worker(server.broker, "--without-mingle", settings=settings, log=tmp_path / "log") as process:
        job = Producer(server.broker).complete(tokens=200).apply_async()
        eventually(lambda: job.state == "STARTED")
        FAULTS[fault](server)
        time.sleep(1.0)
        assert _seconds_to_end(process, signal.SIGQUIT) < 2 + IDLE_S + 0.5


def test_sigterm_waits_for_a_running_job_and_its_answer_is_kept(server: Server, tmp_path: Path) -> None:
    settings = {**_worker_settings(tmp_path), "MODEL": "fake:0.1"}
    with stack.worker(server.broker, "--without-mingle", settings=settings, log=tmp_path / "log") as process:
        job = Producer(server.broker).complete("a long answer", tokens=50).apply_async()
        eventually(lambda: job.state == "STARTED")
        server.kill()
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None
        server.start()
        process.wait(PATIENCE_S)
    again = Producer(server.broker).app.AsyncResult(job.id)
    assert again.state == "SUCCESS"


@ENDS
def test_an_idle_callbacks_worker_ends_at_once(server: Server, tmp_path: Path, fault: str, number: int) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "celery", "-A", "worker.callbacks", "worker", "--without-mingle"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": server.broker.url, "IDEFICS_RESULT_BACKEND": server.broker.results}
    with stack.started(command, log=log, environment=environment) as process:
        stack.await_line(process, log, " ready.", stack.WORKER_START_S)
        FAULTS[fault](server)
        time.sleep(1.5)
        assert _seconds_to_end(process, number) < IDLE_S + 0.5


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(child) for child in found.split()]
