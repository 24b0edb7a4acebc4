"""The channel to a model process on Celery's event loop, where there is one."""

from __future__ import annotations

from collections.abc import Callable

from kombu.asynchronous.hub import Hub

from worker.pool.defects import log_defects
from worker.pool.launch import ModelProcess
from worker.pool.wire import ToModelProcess


class ProcessIO:
    """Has the event loop read a process's messages, and write what its socket did not take at once."""

    def __init__(self, on_readable: Callable[[], None]) -> None:
        self._on_readable = on_readable
        self._hub: Hub | None = None
        self._is_writing = False

    def use(self, hub: Hub | None) -> None:
        """Use this event loop, which watches nothing yet; None for none."""
        self._hub = hub
        self._is_writing = False

    def watch(self, process: ModelProcess) -> None:
        if self._hub is not None:
            self._hub.add_reader(process.channel.fileno(), self._on_readable)

    def unwatch(self, process: ModelProcess) -> None:
        if self._hub is not None:
            self._hub.remove(process.channel.fileno())
            self._hub.remove(process.write_fd)
        self._is_writing = False

    def send(self, process: ModelProcess, message: ToModelProcess) -> None:
        """Send without blocking. Without an event loop, the caller flushes the channel."""
        process.channel.send(message)
        if self._hub is not None and process.channel.has_unsent and not self._is_writing:
            self._is_writing = True
            self._hub.add_writer(process.write_fd, self._on_writable, process)

    @log_defects
    def _on_writable(self, process: ModelProcess) -> None:
        process.channel.flush()
        if not process.channel.has_unsent and self._hub is not None:
            self._hub.remove_writer(process.write_fd)
            self._is_writing = False
