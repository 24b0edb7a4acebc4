"""Messages over the socket between a worker's two processes: a length, then a pickled tuple.

Pickle is safe here: both ends are the same code, and the socket has no other.

Parent to model process: ("run", serial, fast_trace_task's arguments), ("cancel", serial),
("abandon", serial), ("give_back", most, serials), ("stop",).
Back: ("ready",), ("setup_failed", message), ("accepted", serial, time.monotonic()), ("done", serial, outcome),
("raised", serial, exception), ("broken", serial, message), ("canceled", serial, partial result),
("beat", the model's counters, its engine's pace), ("withdrawn", serials that will return),
("returned", serial).
"""

from __future__ import annotations

import pickle  # nosec B403 - see above
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

Message = tuple[Any, ...]

_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 18


class Channel:
    """The parent's end: never blocks. What the socket does not take yet waits here."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        self._outgoing.extend(map(memoryview, _packed(message)))
        self.flush()

    def flush(self) -> None:
        """Hand over as much as fits. An end that is gone is for `receive` to notice."""
        try:
            while self._outgoing:
                first = self._outgoing[0]
                sent = self._connection.send(first)
                if sent == len(first):
                    self._outgoing.popleft()
                else:
                    # Not cut off a buffer: megabytes would be moved each time that the socket takes some more.
                    self._outgoing[0] = first[sent:]
        except BlockingIOError:
            return
        except OSError:
            self._outgoing.clear()

    def receive(self) -> tuple[list[Message], bool]:
        """The messages that have arrived, and whether the other end is gone."""
        closed = False
        try:
            while chunk := self._connection.recv(_CHUNK):
                self._incoming += chunk
            closed = True
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        return list(_unpacked(self._incoming)), closed

    def close(self) -> None:
        self._connection.close()


class BlockingChannel:
    """The model process's end: one thread reads, many write."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        packed = b"".join(_packed(message))
        with self._lock:
            self._connection.sendall(packed)

    def __iter__(self) -> Iterator[Message]:
        """Messages until the parent is gone."""
        incoming = bytearray()
        while chunk := self._connection.recv(_CHUNK):
            incoming += chunk
            yield from _unpacked(incoming)


def _packed(message: Message) -> list[bytes]:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    length = _LENGTH.pack(len(body))
    # Megabytes are not copied for it.
    return [length, body] if len(body) > _CHUNK else [length + body]


def _unpacked(incoming: bytearray) -> Iterator[Message]:
    """The whole messages at the buffer's start, taken out of it."""
    start = 0
    try:
        while len(incoming) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(incoming, start)
            end = start + _LENGTH.size + length
            if len(incoming) < end:
                return
            with memoryview(incoming) as whole, whole[start + _LENGTH.size : end] as body:
                message = pickle.loads(body)  # noqa: S301 # nosec B301 - see the module
            yield message
            start = end
    finally:
        del incoming[:start]
