"""Moments that no wait may outlast, even where a library waits and does not look."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

#: Seconds that a connection may outlast its deadline.
TICK_S = 0.5


class Deadline:
    """A moment that no wait may outlast."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, at_most: float) -> float:
        """Seconds to wait: what is left, `at_most` at most. Raises TimeoutError when none is left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the total deadline has passed")
        return min(left, at_most)

    def extend(self, seconds: float) -> None:
        self._end += seconds

    def has_passed(self) -> bool:
        return time.monotonic() >= self._end


class Watch:
    """Ends connections at their deadlines.

    A timeout ends a wait for bytes. But TLS reads records of its own (tickets, alerts, updates of keys) within one call
    for as long as they come, and a server may send nothing else.
    """

    def __init__(self) -> None:
        self._watched: dict[socket.socket, Deadline] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, connection: socket.socket, deadline: Deadline) -> socket.socket:
        """What to forget once the connection is over: it is another's, and may have become a part of a TLS socket."""
        handle = connection.dup()
        with self._changed:
            self._watched[handle] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, daemon=True, name="deadlines")
                self._thread.start()
            self._changed.notify()
        return handle

    def forget(self, handle: socket.socket) -> None:
        with self._changed:
            self._watched.pop(handle, None)
        handle.close()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched)
                late = [handle for handle, deadline in self._watched.items() if deadline.has_passed()]
            for handle in late:
                # Of the connection itself, whoever else holds it: who reads reaches its end.
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)
            time.sleep(TICK_S)
