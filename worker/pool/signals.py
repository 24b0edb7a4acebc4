"""Celery's shutdown handlers, run from the loop instead of from the signal.

Celery's handler for a cold shutdown cancels requests and sends events inside the signal handler: where the signal
struck while the event dispatcher held its lock, the worker deadlocks (it did 2 of 3 times when tried). So a signal
only leaves its number in a pipe, and whoever reads the pipe runs the handler: the event loop, the pool where there is
none, and the consumer while it reconnects. Where none of them comes to it in time, the exit watchdog ends the process.
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
    """Stands before the handlers that Celery installed. Used in the main thread."""

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
        """Back to Celery's, where they are still ours: a handler may have put another in its place."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._handlers.clear()

    def run(self) -> None:
        """Run the handlers of the signals that have arrived. Raises what they raise, WorkerShutdown above all."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._read_fd, 64):
                handler = self._handlers.get(number)
                if handler is not None:
                    handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, bytes([number]))
