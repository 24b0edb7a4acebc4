"""Cancellation by a key in the results' database, for producers that may not write to Celery's control mailbox.

The parent process polls for the keys of the jobs that it holds and of the jobs that wait in Redis for their time; the
model process checks once before it starts a job. In the same way the parent ends the jobs that it holds of a canceled
campaign; the model process ends the others when they come (worker/jobs/task.py). Those that a pause held back become
due at once. docs/architecture.md follows a cancellation to the engine's next step.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from celery import bootsteps
from celery.worker import state as worker_state

from tasks.outbox import connect
from tasks.redis_keys import CANCELLATION, broker_prefix, results_prefix
from tasks.steering import campaign_of
from worker.observability.job_fields import job_extra
from worker.queue.due import DueJob, DueJobs, hasten
from worker.queue.transport import Channel

logger = logging.getLogger(__name__)

#: Seconds between two polls.
POLL_INTERVAL_S = 0.5
#: Jobs before their time that are ended in one iteration: each costs the event loop some milliseconds. And such that
#: are made due, all by one script.
MAX_AT_ONCE, MAX_HASTENED = 100, 500

T = TypeVar("T")


def canceled_among(ids: Iterable[str], backend: Any, prefix: str = "") -> set[str]:
    """The jobs among these that are canceled by a key. `prefix` stands before all keys. Raises RedisError."""
    wanted = list(ids)
    found = backend.client.mget([prefix + CANCELLATION.named(id) for id in wanted]) if wanted else []
    return {id for id, value in zip(wanted, found, strict=True) if value is not None}


def canceled_due_jobs(jobs: DueJobs, backend: Any, prefix: str = "") -> set[DueJob]:
    """The jobs in the next window that are canceled by a key or by Celery's revocation. Raises RedisError."""
    window = jobs.window()
    canceled = canceled_among({job.id for job in window}, backend, prefix)
    return {job for job in window if job.id in canceled or job.id in worker_state.revoked}


class CancellationPoller(Generic[T]):
    """Polls in a thread: the event loop must not wait for a Redis that is slow or away."""

    def __init__(self, find: Callable[[Iterable[str]], set[T]], pause_s: float = POLL_INTERVAL_S) -> None:
        self._find = find
        self._pause_s = pause_s
        self._ids: tuple[str, ...] = ()
        self._found: set[T] = set()
        self._fails = False

    def start(self) -> None:
        """Start polling, until the process ends: jobs are canceled while it shuts down, too."""
        threading.Thread(target=self._loop, name="cancellations", daemon=True).start()

    def exchange(self, ids: Iterable[str] = ()) -> set[T]:
        """Poll for these ids from now on; returns what the last poll found."""
        self._ids = tuple(ids)
        found, self._found = self._found, set()
        return found

    def _loop(self) -> None:
        while True:
            time.sleep(self._pause_s)
            try:
                self._found = self._find(self._ids)
                self._fails = False
            except Exception as error:
                if not self._fails:
                    logger.warning("Cancellations cannot be polled (%s); jobs go on until Redis answers.", error)
                self._fails = True


class Cancellations(bootsteps.StartStopStep):  # type: ignore[misc]
    """Ends canceled jobs that the parent process holds, as Celery's revocation does."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        self._worker = worker
        self._pool = worker.pool
        #: Ids that were revoked here because of a key. Celery forgets a revoked id after hours; it may be used again
        #: before.
        self._canceled: set[str] = set()
        backend, prefix = worker.app.backend, results_prefix(worker.app)
        self._poller = CancellationPoller(lambda ids: canceled_among(ids, backend, prefix))
        jobs = DueJobs(lambda: (connect(worker.app), broker_prefix(worker.app)))
        self._due_poller = CancellationPoller(lambda _: canceled_due_jobs(jobs, backend, prefix))
        self._poller.start()
        self._due_poller.start()
        worker.app.campaign_watch.start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Called at every reconnect to the broker, with an empty event loop."""
        hub.call_repeatedly(POLL_INTERVAL_S / 2, self._end_canceled)

    def _end_canceled(self) -> None:
        held = defaultdict(list)
        for request in worker_state.reserved_requests:
            held[request.id].append(request)
        for id in self._canceled - held.keys():
            self._canceled.discard(id)
            worker_state.revoked.discard(id)
        for id in self._poller.exchange(id for id in held if id not in worker_state.revoked) & held.keys():
            self._end(held[id], "by its key")
        self._end_campaigns(held)
        channel = self._channel()
        if channel is not None:
            self._end_due(channel)
            self._hasten_freed(channel)

    def _end_campaigns(self, held: Mapping[str, list[Any]]) -> None:
        watch = self._worker.app.campaign_watch
        watch.refresh()
        for id, requests in held.items():
            campaign = campaign_of(requests[0].request_dict)
            if campaign and watch.wanted(campaign).state == "canceled" and id not in worker_state.revoked:
                self._end(requests, f"with its campaign {campaign}")

    def _end(self, requests: list[Any], how: str) -> None:
        id = requests[0].id
        logger.info("Job %s is canceled %s.", id, how, extra=job_extra(id, requests[0].task_name))
        self._canceled.add(id)
        # For a request that still waits for a place in the pool.
        worker_state.revoked.add(id)
        for request in requests:
            request.terminate(self._pool)

    def _channel(self) -> Channel | None:
        """The one that jobs come from; None while there is no connection, and for kombu's own."""
        consumer = self._worker.consumer.task_consumer
        channel = consumer and consumer.channel
        return channel if isinstance(channel, Channel) else None

    def _end_due(self, channel: Channel) -> None:
        """Deliver canceled jobs before their time: Celery ends a revoked job when it is delivered."""
        for job in itertools.islice(self._due_poller.exchange(), MAX_AT_ONCE):
            if job.id not in worker_state.revoked:
                self._canceled.add(job.id)
                worker_state.revoked.add(job.id)
            channel.deliver_early(job)

    def _hasten_freed(self, channel: Channel) -> None:
        """Make jobs due whose campaign was paused and is no longer."""
        if jobs := self._worker.app.campaign_watch.freed(MAX_HASTENED):
            hasten(channel, jobs)
