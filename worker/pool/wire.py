"""Messages over the socket between a worker's two processes: a length, then a pickled tuple of the
message's class, as a number, and its fields.

Pickle is safe here: both ends are the same code, and the socket has no other.
"""

from __future__ import annotations

import pickle  # nosec B403 - see above
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from billiard.einfo import ExceptionInfo

from worker.observability.exposition import Values

_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 18

#: Exit status of a model process whose device is lost.
DEVICE_LOST = 74

# A job is identified by its serial number, which the parent gives it.

# From the parent to the model process


@dataclass(frozen=True)
class RunJob:
    """Run a job."""

    serial: int
    #: Those of Celery's fast_trace_task: name, id, request, body, content type, content encoding.
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Cancel:
    """End a canceled job: before it begins, or at the next step."""

    serial: int


@dataclass(frozen=True)
class Abandon:
    """End the run of a job that has failed by its time limit: its result no longer counts."""

    serial: int


@dataclass(frozen=True)
class GiveBack:
    """End, of these jobs, up to `most` that have not begun: another worker is idle."""

    most: int
    serials: Sequence[int]


@dataclass(frozen=True)
class Stop:
    """End the process."""


# From the model process to the parent


@dataclass(frozen=True)
class Ready:
    """The model is loaded and answers."""


@dataclass(frozen=True)
class CannotServe:
    """The model cannot be loaded, or answers wrongly; loading it again would not help."""

    reason: str


@dataclass(frozen=True)
class Heartbeat:
    """The engine's thread is alive: sent at its steps, twice a second, and when its capacity changes."""

    #: The model's counters.
    metrics: Mapping[str, int]
    #: Jobs that could be under way at once; further jobs wait for the end of others.
    capacity: int
    #: Jobs that run at once while others wait.
    width: float
    #: Seconds that a job takes once it has begun; 0 before the first job.
    job_s: float
    #: Seconds until further jobs may join the running ones.
    closed_s: float


@dataclass(frozen=True)
class Metrics:
    """The values of metrics that have changed since the last message of this class."""

    changed: Values


@dataclass(frozen=True)
class Started:
    """A thread has begun with the job, at time.monotonic() `at`."""

    serial: int
    at: float


@dataclass(frozen=True)
class Waited:
    """The job waited for Redis. These seconds do not count towards its time limit."""

    serial: int
    seconds: float


@dataclass(frozen=True)
class Done:
    """The task ran, and its result, failure or retry is stored. `outcome` is fast_trace_task's."""

    serial: int
    outcome: tuple[Any, ...]


@dataclass(frozen=True)
class Raised:
    """The task ended with a rejection, which Celery's tracer does not store."""

    serial: int
    exception: ExceptionInfo


@dataclass(frozen=True)
class Broken:
    """The task ended with a defect outside of Celery's tracer."""

    serial: int
    message: str


@dataclass(frozen=True)
class Away:
    """Redis stayed away for longer than a job waits."""

    serial: int


@dataclass(frozen=True)
class Canceled:
    """The job was canceled. `partial` is its result so far, as JSON; None where it had not begun."""

    serial: int
    partial: dict[str, Any] | None = None


@dataclass(frozen=True)
class Parked:
    """The job's thread has ended: the job waits for this host until the model process asks for it."""

    serial: int
    host: str


@dataclass(frozen=True)
class Resume:
    """Send up to `most` jobs that wait for this host."""

    host: str
    most: int


@dataclass(frozen=True)
class Withdrawn:
    """These jobs have not begun and will be returned, each by a message `Returned`."""

    serials: Sequence[int]


@dataclass(frozen=True)
class Returned:
    """The thread of a withdrawn job has ended: the job may return to its queue."""

    serial: int


ToModelProcess = RunJob | Cancel | Abandon | GiveBack | Stop
JobEnd = Done | Raised | Broken | Away | Canceled
#: The last message of a job's thread.
FinalMessage = JobEnd | Returned | Parked
#: Messages to the parent about jobs.
JobMessage = Started | Waited | Withdrawn | Resume | FinalMessage
FromModelProcess = Ready | CannotServe | Heartbeat | Metrics | JobMessage
Message = ToModelProcess | FromModelProcess

_CLASSES: tuple[type[Message], ...] = get_args(Message)
_NUMBERS = {kind: number for number, kind in enumerate(_CLASSES)}


class NonBlockingChannel:
    """The parent's end, which never blocks: it keeps what the socket does not take yet."""

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

    def send(self, message: ToModelProcess) -> None:
        self._outgoing.extend(map(memoryview, _packed(message)))
        self.flush()

    def flush(self) -> None:
        """Send as much as the socket takes. `receive` notices if the other end is gone."""
        try:
            while self._outgoing:
                first = self._outgoing[0]
                sent = self._connection.send(first)
                if sent == len(first):
                    self._outgoing.popleft()
                else:
                    # A view, not a shortened buffer: megabytes would be copied each time that the socket takes some
                    # more.
                    self._outgoing[0] = first[sent:]
        except BlockingIOError:
            return
        except OSError:
            self._outgoing.clear()

    def receive(self) -> tuple[list[FromModelProcess], bool]:
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

    def send(self, message: FromModelProcess) -> None:
        packed = b"".join(_packed(message))
        with self._lock:
            self._connection.sendall(packed)

    def __iter__(self) -> Iterator[ToModelProcess]:
        """Messages until the parent is gone."""
        incoming = bytearray()
        while chunk := self._connection.recv(_CHUNK):
            incoming += chunk
            yield from _unpacked(incoming)


def _packed(message: Message) -> list[bytes]:
    # The class is sent as a number: pickling and unpickling an instance takes three times as long.
    numbered = (_NUMBERS[type(message)], *vars(message).values())
    body = pickle.dumps(numbered, protocol=pickle.HIGHEST_PROTOCOL)
    length = _LENGTH.pack(len(body))
    # Megabytes are not copied just to prepend the length.
    return [length, body] if len(body) > _CHUNK else [length + body]


def _unpacked(incoming: bytearray) -> Iterator[Any]:
    """Remove and return the complete messages at the buffer's start."""
    start = 0
    try:
        while len(incoming) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(incoming, start)
            end = start + _LENGTH.size + length
            if len(incoming) < end:
                return
            with memoryview(incoming) as whole, whole[start + _LENGTH.size : end] as body:
                number, *fields = pickle.loads(body)  # noqa: S301 # nosec B301 - see the module
            yield _CLASSES[number](*fields)
            start = end
    finally:
        del incoming[:start]
