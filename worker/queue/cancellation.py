"""Cancellation by a key in the results' database, for producers that may not write to Celery's control mailbox.

The parent process looks for the keys of the jobs that it holds, and of those that wait in Redis for their time; the
model process looks once before it starts a job. docs/architecture.md follows a cancellation to the engine's next
step.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from celery import bootsteps
from celery.worker import state as worker_state

from tasks.outbox import connect
from tasks.redis_keys import CANCELLATION, broker_prefix, results_prefix
from worker.queue.due import DueJob, DueJobs
from worker.queue.transport import Channel

logger = logging.getLogger(__name__)

#: Seconds between two looks.
POLL_INTERVAL_S = 0.5
#: Jobs before their time that are ended in one go: each costs the event loop some milliseconds.
MAX_AT_ONCE = 100

T = TypeVar("T")


def canceled_among(ids: Iterable[str], backend: Any, prefix: str = "") -> set[str]:
    """The jobs that have a key, which begins with `prefix`. Raises RedisError."""
    asked = list(ids)
    found = backend.client.mget([prefix + CANCELLATION.named(id) for id in asked]) if asked else []
    return {id for id, value in zip(asked, found, strict=True) if value is not None}


def canceled_due_jobs(jobs: DueJobs, backend: Any, prefix: str = "") -> set[DueJob]:
    """Those in the next window that have a key, or that Celery's revocation has named. Raises RedisError."""
    window = jobs.window()
    canceled = canceled_among({job.id for job in window}, backend, prefix)
    return {job for job in window if job.id in canceled or job.id in worker_state.revoked}


class CancellationPoller(Generic[T]):
    """Looks again and again, in a thread: the event loop must not wait for a Redis that is slow or away."""

    def __init__(self, look: Callable[[Iterable[str]], set[T]], pause_s: float = POLL_INTERVAL_S) -> None:
        self._look = look
        self._pause_s = pause_s
        self._ids: tuple[str, ...] = ()
        self._found: set[T] = set()
        self._is_blind = False

    def start(self) -> None:
        """For as long as the process lives: jobs are canceled while it shuts down, too."""
        threading.Thread(target=self._loop, name="cancellations", daemon=True).start()

    def exchange(self, ids: Iterable[str] = ()) -> set[T]:
        """Look for these from now on; what the last look found."""
        self._ids = tuple(ids)
        found, self._found = self._found, set()
        return found

    def _loop(self) -> None:
        while True:
            time.sleep(self._pause_s)
            try:
                self._found = self._look(self._ids)
                self._is_blind = False
            except Exception as error:
                if not self._is_blind:
                    logger.warning("Cannot look for cancellations (%s); jobs go on until Redis answers.", error)
                self._is_blind = True


class Cancellations(bootsteps.StartStopStep):  # type: ignore[misc]
    """The parent's part: ends the jobs that it holds as Celery's revocation does."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        self._worker = worker
        self._pool = worker.pool
        #: Those that a key has revoked here. Celery forgets an id hours later, and it may be used again before.
        self._canceled: set[str] = set()
        backend, prefix = worker.app.backend, results_prefix(worker.app)
        self._poller = CancellationPoller(lambda ids: canceled_among(ids, backend, prefix))
        jobs = DueJobs(lambda: (connect(worker.app), broker_prefix(worker.app)))
        self._due_poller = CancellationPoller(lambda _: canceled_due_jobs(jobs, backend, prefix))
        self._poller.start()
        self._due_poller.start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Called at every reconnect to the broker, with an empty event loop."""
        hub.call_repeatedly(POLL_INTERVAL_S / 2, self._look)

    def _look(self) -> None:
        held = defaultdict(list)
        for request in worker_state.reserved_requests:
            held[request.id].append(request)
        for id in self._canceled - held.keys():
            self._canceled.discard(id)
            worker_state.revoked.discard(id)
        for id in self._poller.exchange(id for id in held if id not in worker_state.revoked) & held.keys():
            logger.info("Job %s is canceled by its key.", id)
            self._canceled.add(id)
            # For when it waits for its turn.
            worker_state.revoked.add(id)
            for request in held[id]:
                request.terminate(self._pool)
        self._end_due()

    def _end_due(self) -> None:
        """Take canceled jobs that wait for their time: Celery ends what is revoked as it comes."""
        consumer = self._worker.consumer.task_consumer
        channel = consumer and consumer.channel
        if not isinstance(channel, Channel):
            return
        for job in itertools.islice(self._due_poller.exchange(), MAX_AT_ONCE):
            if job.id not in worker_state.revoked:
                self._canceled.add(job.id)
                worker_state.revoked.add(job.id)
            channel.deliver_early(job)
