"""Deadlines for network waits, enforced even if a library waits without a timeout."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

#: Seconds between two checks of the watchdog, and so the maximum delay of a connection's end.
CHECK_INTERVAL_S = 0.5


class Deadline:
    """The time at which all waits of a request end."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: from now."""
        self._end = time.monotonic() + seconds

    def left(self, at_most: float) -> float:
        """The remaining seconds, or `at_most` if these are fewer. Raises TimeoutError if none remain."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the total deadline has passed")
        return min(left, at_most)

    def extend(self, seconds: float) -> None:
        """Postpone the deadline by seconds that must not count."""
        self._end += seconds

    def has_passed(self) -> bool:
        """Whether no time remains."""
        return time.monotonic() >= self._end


class DeadlineWatchdog:
    """A thread that shuts connections down at their deadlines. Thread-safe.

    A socket's timeout only ends a wait for bytes. One call of TLS goes on as long as the server sends TLS's own records
    (tickets, alerts, key updates), and a hostile server may send only those.
    """

    def __init__(self) -> None:
        self._watched: dict[socket.socket, Deadline] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, connection: socket.socket, deadline: Deadline) -> socket.socket:
        """Watch a connection. Returns the handle to `forget` when the connection is closed.

        The handle is a duplicate, since the connection may become part of a TLS socket, or be one.
        """
        handle = socket.socket(fileno=os.dup(connection.fileno()))
        with self._changed:
            self._watched[handle] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, daemon=True, name="deadlines")
                self._thread.start()
            self._changed.notify()
        return handle

    def forget(self, handle: socket.socket) -> None:
        """Stop watching the connection of a handle, and close the handle."""
        with self._changed:
            self._watched.pop(handle, None)
        handle.close()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched)
                late = [handle for handle, deadline in self._watched.items() if deadline.has_passed()]
            for handle in late:
                # This ends the connection itself, not only the handle: the thread that reads it gets its end.
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)
            time.sleep(CHECK_INTERVAL_S)
