"""Deadlines for network waits, enforced even where a library waits without looking at the time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

#: Seconds between two checks of the watchdog: how long a connection may outlast its deadline.
CHECK_INTERVAL_S = 0.5


class Deadline:
    """A point in time that no wait may outlast."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: from now."""
        self._end = time.monotonic() + seconds

    def left(self, at_most: float) -> float:
        """Seconds to wait: those that remain, `at_most` at most. Raises TimeoutError when none remain."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the total deadline has passed")
        return min(left, at_most)

    def extend(self, seconds: float) -> None:
        """Move the deadline back by a wait that is not to count."""
        self._end += seconds

    def has_passed(self) -> bool:
        return time.monotonic() >= self._end


class DeadlineWatchdog:
    """Shuts connections down at their deadlines, from a thread of its own. Thread-safe.

    A socket's timeout ends a wait for bytes. But TLS reads records of its own (tickets, alerts, key updates) within one
    call for as long as they come, and a server may send nothing else.
    """

    def __init__(self) -> None:
        self._watched: dict[socket.socket, Deadline] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, connection: socket.socket, deadline: Deadline) -> socket.socket:
        """Watch a connection. Returns the handle to `forget` once the connection is over.

        The handle is a duplicate, since the connection may become part of a TLS socket.
        """
        handle = connection.dup()
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
                # Of the connection itself, not of this handle only: the thread that reads it meets its end.
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)
            time.sleep(CHECK_INTERVAL_S)
