"""Sends many jobs together: their messages are collected, and go to Redis in one round trip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Unpack

from .broker_errors import with_our_errors
from .payloads import Job
from .protocol import DEFAULT_PRIORITY
from .submission import Sent, SubmitOptions, queue_full_if_full

#: Jobs, and bytes of their arguments, that are collected at most. More would save little, and all are in memory.
MAX_JOBS, MAX_BYTES = 100, 1_000_000

#: Called with a number of jobs once they have been sent.
OnSent = Callable[[int], None]


def ignore_sent(jobs: int) -> None:
    """For callers that do not follow how far the sending is."""


class JobSender(Protocol):
    """What takes jobs to be sent: a Bulk, or a client."""

    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> Any:
        """Take a job. Raises the errors of `Client.submit`."""


class Collector:
    """Stands in for kombu's producer while messages are collected."""

    def __init__(self, connection: Any) -> None:
        #: Celery converts errors by it.
        self.connection = connection
        self._messages: list[tuple[Any, dict[str, Any]]] = []

    def publish(self, body: Any, **options: Any) -> None:
        """Collect a message."""
        self._messages.append((body, options))

    def take(self) -> list[tuple[Any, dict[str, Any]]]:
        """The collected messages, which are then forgotten."""
        messages, self._messages = self._messages, []
        return messages


class Bulk:
    """Jobs that are sent together. For one thread."""

    def __init__(
        self, send: Callable[[Job, int, dict[str, Any]], Sent], producer: Any, on_sent: OnSent = ignore_sent
    ) -> None:
        """`send`: sends a job with the producer in its options. `producer`: sends what is collected."""
        self._send = send
        self._producer = producer
        self._on_sent = on_sent
        self._collector = Collector(producer.connection)
        self._jobs = self._bytes = 0

    @with_our_errors
    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> None:
        """Collect a job, and send what is collected where it is enough. Raises the errors of `Client.submit`: then
        this job is not among those that will be sent."""
        if job.idempotency_key is not None:
            # Its key may only be confirmed once the job is sent.
            self.flush()
            self._send(job, priority, {**options, "producer": self._producer})
            self._on_sent(1)
            return
        self._bytes += self._send(job, priority, {**options, "producer": self._collector}).size
        self._jobs += 1
        if self._jobs >= MAX_JOBS or self._bytes >= MAX_BYTES:
            self.flush()

    @with_our_errors
    def flush(self) -> None:
        """Send what is collected. If it raises, some of these jobs may be in the queue all the same: a job that is
        submitted again under the same id ends once."""
        messages, jobs = self._collector.take(), self._jobs
        self._jobs = self._bytes = 0
        if not jobs:
            return
        with queue_full_if_full():
            self._producer.publish_together(messages)
        self._on_sent(jobs)


class OneByOne:
    """Has a Bulk's methods, and sends each job at once: for clients of the caller's own."""

    def __init__(self, client: JobSender, on_sent: OnSent = ignore_sent) -> None:
        self._client = client
        self._on_sent = on_sent

    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> None:
        """Send a job. Raises the errors of the client's `submit`."""
        self._client.submit(job, priority=priority, **options)
        self._on_sent(1)

    def flush(self) -> None:
        """Nothing is collected."""


@contextlib.contextmanager
def bulk_of(client: Any, on_sent: OnSent) -> Iterator[JobSender]:
    """A client's `bulk`; for one that has none, each job is sent at once."""
    if hasattr(client, "bulk"):
        with client.bulk(on_sent) as bulk:
            yield bulk
    else:
        yield OneByOne(client, on_sent)
