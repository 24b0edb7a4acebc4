"""The model process as its parent sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from worker.pool.wire import FromModelProcess, NonBlockingChannel

CHECKOUT = Path(__file__).parents[2]


class ModelProcess:
    """A running `worker.model_process`, and the channel to it."""

    def __init__(self, hostname: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "worker.model_process", str(theirs.fileno()), hostname],
                pass_fds=[theirs.fileno()],
                cwd=CHECKOUT,
                # Celery's initializer then sets the task registry up as in a spawned process.
                env={**os.environ, "FORKED_BY_MULTIPROCESSING": "1"},
            )
        self.channel = NonBlockingChannel(ours)
        self.is_ready = False
        self.started_at = self.last_heartbeat = time.monotonic()
        # An epoll object takes a descriptor once: reading and writing are watched through two descriptors.
        self.write_fd = os.dup(ours.fileno())

    @property
    def pid(self) -> int:
        return self._popen.pid

    def receive(self) -> tuple[list[FromModelProcess], bool]:
        """Messages that have arrived, and whether the process has ended."""
        return self.channel.receive()

    def kill(self) -> None:
        self._popen.kill()

    def end(self, grace_s: float = 0.0) -> int:
        """Wait up to `grace_s` seconds for it to exit, then kill it. Returns its exit status."""
        try:
            return self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()

    def close(self) -> None:
        self.channel.close()
        os.close(self.write_fd)
