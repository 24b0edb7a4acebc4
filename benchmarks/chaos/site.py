"""The site that faults happen to: a persistent broker, two workers behind a proxy, an image server.

A process that ends is started again at once, as a process supervisor does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import redis

from benchmarks.chaos import ledger
from benchmarks.chaos.checker import Remains
from benchmarks.chaos.pictures import Pictures
from benchmarks.chaos.proxy import Proxy
from worker import health
from worker.demo import stack

WORKERS = 2
#: Seconds for anything of the site to come up.
PATIENCE_S = 60.0
#: The defaults, scaled: what a deployment waits minutes for must come back in seconds.
VISIBILITY_S = 6
SETTINGS = {
    "MODEL": "fake:0.02",
    "VISIBILITY_TIMEOUT_S": str(VISIBILITY_S),
    "HANG_TIMEOUT_S": "3",
    # A process may be struck while it loads, for two seconds or so: then this is what tells that it hangs.
    "LOAD_TIMEOUT_S": "8",
    "SOFT_SHUTDOWN_TIMEOUT_S": "1",
    "RESTART_BACKOFF_S": "0.1",
    "IMAGE_TIMEOUT_S": "2",
    "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8",
    # An image server is dead for as long as a fault lasts: jobs that show its pictures outlast that.
    "MAX_RETRIES": "8",
    "RETRY_BACKOFF_S": "0.2",
}


class Supervised:
    """A process that is started again whenever it ends."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._command, self._log, self._environment = command, log, environment
        self._is_closing = False
        self.process: subprocess.Popen[bytes] | None = None
        # It waits in this thread: a process dies with the thread that started it.
        self._thread = threading.Thread(target=self._keep, name=log.stem, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._is_closing:
            with stack.started(self._command, log=self._log, environment=self._environment) as process:
                self.process = process
                process.wait()

    def send_signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def close(self) -> None:
        self._is_closing = True
        if self.process is not None:
            self.process.terminate()
        self._thread.join()


T = TypeVar("T", bound=Supervised)


class Worker(Supervised):
    """One of ours."""

    def __init__(self, site: Site, number: int) -> None:
        self.name = f"worker-{number}"
        self._state = site.folder / f"{self.name}.state"
        settings = {
            **SETTINGS,
            "IMAGE_PORTS": str(site.pictures.port),
            "STATE_FILE": str(self._state),
            "BROKER_URL": f"redis://127.0.0.1:{site.proxy.port}/0",
            "RESULT_BACKEND": f"redis://127.0.0.1:{site.proxy.port}/1",
        }
        environment = _environment() | {f"IDEFICS_{name}": value for name, value in settings.items()}
        environment |= {
            "CELERY_LOADER": "benchmarks.chaos.loader:Loader",
            ledger.WORKER: self.name,
            ledger.STEPS: str(site.folder / "worker.jsonl"),
        }
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--hostname", f"{self.name}@chaos"]
        super().__init__(command, site.folder / f"{self.name}.log", environment)

    @property
    def is_ready(self) -> bool:
        return any(report.is_ready for report in health.reports(self._state))

    def model(self) -> psutil.Process | None:
        """Its model process, while it has one."""
        with contextlib.suppress(psutil.Error):
            if self.process is not None:
                return next(iter(psutil.Process(self.process.pid).children()), None)
        return None


class Site:
    """Use it through `open_site`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = stack.free_port()
        self.proxy = Proxy(self.port)
        self.pictures = Pictures()
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        self._stack.enter_context(self.pictures.open())
        self._stack.enter_context(self.proxy.open())
        # `always`: with `everysec` the server itself may lose a second that it had accepted.
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        data = self.folder / "data"
        data.mkdir()
        command = [stack.server_binary(), "--port", str(self.port), "--dir", str(data), *options]
        self.broker = self._supervise(Supervised(command, self.folder / "broker.log", _environment()))
        await_true(self.answers)
        self.notes = self._supervise(self._links())
        self.workers = [self._supervise(Worker(self, number)) for number in range(WORKERS)]
        await_true(lambda: all(worker.is_ready for worker in self.workers))

    def close(self) -> None:
        self._stack.close()

    def _supervise(self, process: T) -> T:
        self._stack.callback(process.close)
        return process

    def _links(self) -> Supervised:
        environment = _environment() | {
            ledger.BROKER: f"redis://127.0.0.1:{self.port}/0",
            ledger.VISIBILITY_S: str(VISIBILITY_S),
            ledger.CALLS: str(self.folder / "calls.jsonl"),
        }
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.chaos.notes", "worker", "--pool", "solo"]
        command += ["--without-mingle", "--without-gossip", "--hostname", "notes@chaos"]
        return Supervised(command, self.folder / "notes.log", environment)

    def connect(self, database: int = 0) -> redis.Redis:
        return redis.Redis(port=self.port, db=database, socket_timeout=30)

    def answers(self) -> bool:
        try:
            return bool(self.connect().ping())
        except redis.RedisError:
            return False

    def remains(self) -> Remains:
        """What is left in Redis beside the keys that end by themselves."""
        with self.connect() as queues:
            unacked = max(queues.hlen("unacked"), queues.zcard("unacked_index"))
            lists = [key for key in queues.scan_iter() if queues.type(key) == b"list"]
            queued = sum(queues.llen(key) for key in lists)
        strays = []
        for database in (0, 1):
            with self.connect(database) as client:
                lasting = [key.decode() for key in client.scan_iter() if client.ttl(key) == -1]
                strays += [f"{database}:{key}" for key in lasting if not key.startswith("_kombu.binding")]
        return Remains(queued, unacked, tuple(strays))


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """Everything, ready; and gone at the end."""
    site = Site(folder)
    try:
        site.start()
        yield site
    finally:
        site.close()


def await_true(holds: Callable[[], bool], timeout: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"It did not come true in {timeout} s; see the logs.")
        time.sleep(0.1)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
