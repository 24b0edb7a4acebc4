"""Celery's shutdown handlers, run from the loop instead of from the signal.

Celery's handler for a cold shutdown cancels requests and sends events inside the signal handler. If the signal arrives
while the event dispatcher holds its lock, the worker deadlocks (2 of 3 times in a test). So a signal only writes its
number to a pipe, and the reader of the pipe runs the handler: the event loop, the pool without one, or the consumer
while it reconnects. If they do not run it in time, `worker/runtime/exit_watchdog.py` ends the process. What a shutdown
then does to the jobs that run is in `SoftShutdown` of `worker/pool/bootsteps.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)


class DeferredSignals:
    """Delays the handlers that Celery installed until `run` is called. For the main thread."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def fileno(self) -> int:
        return self._read_fd

    def install(self) -> None:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Put Celery's handlers back, unless a handler has installed another one meanwhile."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._handlers.clear()

    def run(self) -> None:
        """Run the handlers of the signals that have arrived. Raises what they raise, such as WorkerShutdown."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._read_fd, 64):
                handler = self._handlers.get(number)
                if handler is not None:
                    handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, bytes([number]))
