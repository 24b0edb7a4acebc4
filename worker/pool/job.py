"""A job in the pool, and the callbacks of Celery's request for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from celery.worker.request import Request
from kombu.serialization import loads

from tasks.protocol import RUN, SUBMITTED_AT
from worker.queue.result_backend import digest_of
from worker.runtime.exception_info import exception_info

RequestCallback = Callable[..., Any]


class JobState(Enum):
    #: It is in the parent process.
    WAITING = "waiting"
    #: It was sent to the model process, where it waits for a thread.
    SENT = "sent"
    RUNNING = "running"


@dataclass(slots=True)
class RequestCallbacks:
    """Methods of Celery's request for a job, called when the job starts and ends."""

    accept: RequestCallback
    success: RequestCallback
    failure: RequestCallback

    @property
    def owner(self) -> Any:
        """The object that they are methods of."""
        return getattr(self.failure, "__self__", None)

    @property
    def request(self) -> Request | None:
        """The owner, if it is a request of Celery's."""
        owner = self.owner
        return owner if isinstance(owner, Request) else None


@dataclass(eq=False, weakref_slot=True, slots=True)
class PoolJob:
    """A job that the pool holds; the result of `apply_async`. Celery has a weak reference and calls `terminate`."""

    #: Identifies it in messages between the two processes.
    serial: int
    #: Those of Celery's fast_trace_task: name, id, request, body, content type, content encoding.
    trace_arguments: tuple[Any, ...]
    callbacks: RequestCallbacks
    #: Seconds from its start; None: no limit.
    hard_limit: float | None
    cancel: Callable[[PoolJob], None]
    state: JobState = JobState.WAITING
    accepted_at: float | None = None
    #: Seconds since then that it waited for Redis, which do not count as running.
    waited_s: float = 0.0
    canceled: bool = False
    #: A canceled job's result so far, as JSON.
    partial: dict[str, Any] | None = None
    #: Deaths of the model process while only this job ran.
    deaths: int = 0
    #: A process died while it ran: it runs in quarantine, and is not returned for other workers.
    is_suspect: bool = False
    #: time.monotonic() when it was admitted.
    taken_at: float = field(default_factory=time.monotonic)
    #: How often it was returned from lost workers, and whether its start must still be recorded
    #: (worker/queue/redeliveries.py).
    returns: int = 0
    is_uncounted: bool = False
    #: The image host that it waits for, parked; and whether it has one of the pool's places.
    waits_for: str | None = None
    has_place: bool = True

    #: Its id and the number of its retries.
    key: tuple[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.id, self.trace_arguments[2].get("retries") or 0

    @property
    def id(self) -> str:
        return str(self.trace_arguments[1])

    def is_same_as(self, other: PoolJob) -> bool:
        """Whether both have the same task and arguments: one message delivered again, or one job sent twice.

        Not if a worker has sent one of them again: it must run after the other.
        """
        if self.trace_arguments[2].get(RUN) != other.trace_arguments[2].get(RUN):
            return False
        (task, _, _, body, *_), (other_task, _, _, other_body, *_) = self.trace_arguments, other.trace_arguments
        return (task, body) == (other_task, other_body) or self._asked() == other._asked()

    def _asked(self) -> str:
        task, _, _, *content = self.trace_arguments
        args, kwargs, _ = loads(*content)
        return digest_of(task, args, kwargs)

    @property
    def queue(self) -> str:
        """The name of the queue that it came from."""
        return str((self.trace_arguments[2].get("delivery_info") or {}).get("routing_key"))

    @property
    def priority(self) -> int:
        """0 is the most urgent."""
        return int((self.trace_arguments[2].get("delivery_info") or {}).get("priority") or 0)

    def is_overdue(self, now: float) -> bool:
        return (
            self.state is JobState.RUNNING
            and bool(self.hard_limit)
            and self.accepted_at is not None
            and now - self.accepted_at - self.waited_s > (self.hard_limit or 0)
        )

    def accept(self, pid: int, at: float) -> None:
        """Note that it runs. Celery is notified of the first run only, not of one after a death of the process."""
        self.state = JobState.RUNNING
        if self.accepted_at is None:
            self.callbacks.accept(pid, at)
        self.accepted_at = at

    def fail(self, error: BaseException) -> None:
        self.callbacks.failure(exception_info(error))

    def give_back(self) -> None:
        """Put its message back into its queue, unchanged."""
        self.callbacks.owner.give_back()

    def run_again(self) -> None:
        """Have it wait again, marked as redelivered, so that a result stored before the death is kept."""
        self.state = JobState.WAITING
        self.is_suspect = True
        name, id, request, *rest = self.trace_arguments
        delivery = {**(request.get("delivery_info") or {}), "redelivered": True}
        self.trace_arguments = (name, id, {**request, "delivery_info": delivery}, *rest)

    def terminate(self, signal: int | None = None) -> None:
        """Celery's hook for `revoke(terminate=True)`: the job ends, the process stays."""
        self.cancel(self)


def is_redelivered(trace_arguments: tuple[Any, ...]) -> bool:
    """Whether the broker says that the job was delivered before, to any worker."""
    return bool((trace_arguments[2].get("delivery_info") or {}).get("redelivered"))


def sendable(trace_arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """fast_trace_task's arguments without the second copy of the payload, and with the time of submission."""
    name, id, request, *rest = trace_arguments
    lean = {key: value for key, value in request.items() if key not in ("args", "kwargs")}
    lean.setdefault(SUBMITTED_AT, time.time())
    return (name, id, lean, *rest)
