"""Redis servers that fail in the ways that real ones do, and brokers made of them."""

from __future__ import annotations

import resource
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import redis
from kombu import Connection

from tests.support.waiting import eventually
from worker.demo import stack


class RestartableServer:
    """A Redis server that keeps what it accepted in a file, and can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, stack.free_port()
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [stack.server_binary(), *options], stdout=log, stderr=log, preexec_fn=_bear_full_disks
            )
        eventually(self._answers)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def limit_disk(self, size: int) -> None:
        """Bytes of its largest file: a disk that is full refuses as this does."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def broker(self) -> stack.Broker:
        return stack.Broker(self.port, process=self.process)

    def _answers(self) -> bool:
        try:
            return bool(self.broker().connect().ping())
        except redis.ConnectionError:
            return False


def _bear_full_disks() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateResults(stack.Broker):
    """A broker whose results lie on a server of their own."""

    results_server: stack.Broker

    @property
    def results(self) -> str:
        return self.results_server.results


def let_the_visibility_timeout_pass(server: stack.Broker) -> None:
    """Deliver all held messages again, as workers do for a silent one: now instead of in an hour."""
    options = {"visibility_timeout": 0, "priority_steps": list(range(10))}
    with Connection(server.url, transport="worker.queue.transport:Transport", transport_options=options) as connection:
        connection.default_channel.qos.restore_visible(num=100)
