"""Registers this worker in Redis, with its queues, model and options, for clients (`tasks/worker_registry.py`)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

from celery import bootsteps
from redis import RedisError

from config.settings import Settings
from tasks.availability import is_away
from tasks.outbox import connect
from tasks.worker_registry import RENEW_S, WorkerOptions, deregister, publish, register
from tasks.worker_status import WorkerLimits
from worker.observability.exposition import MODEL_PROCESS, BothProcesses
from worker.observability.recent_work import RecentWork

logger = logging.getLogger(__name__)

#: Seconds that the worker's end waits for its deregistration.
LEAVE_S = 2.0


class WorkerRegistration(bootsteps.StartStopStep):  # type: ignore[misc]
    """Renews the keys in a thread, since the event loop must not wait for Redis.

    At the worker's end its name is removed; the keys expire later.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._is_ending = threading.Event()
        self._thread = threading.Thread(
            target=self._renew, args=[worker.app, worker.hostname], daemon=True, name="worker-registration"
        )

    def start(self, worker: Any) -> None:
        self._thread.start()

    def stop(self, worker: Any) -> None:
        self._is_ending.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_S)

    terminate = stop

    def _renew(self, app: Any, name: str) -> None:
        options, broker, is_logged = WorkerOptions.of(app), None, False
        work = RecentWork(BothProcesses(MODEL_PROCESS).collect, app.settings.model, limits_of(app.settings))
        while not self._is_ending.is_set():
            try:
                broker = broker or connect(app)
                publish(app, options, broker)
                register(app, name, app.settings.model, broker, work.status(time.monotonic()))
            except Exception as error:
                if not is_logged and not is_away(error):
                    logger.warning("This worker cannot be registered for clients: %s", error)
                    is_logged = True
            self._is_ending.wait(RENEW_S)
        if broker is not None:
            with contextlib.suppress(RedisError):
                deregister(app, name, broker)


def limits_of(settings: Settings) -> WorkerLimits:
    """The limits that a worker with these settings has."""
    return WorkerLimits(
        host_concurrency=settings.image_host_concurrency,
        host_shared=settings.image_host_shared,
        image_jobs=settings.image_job_concurrency,
        image_timeout_s=settings.image_timeout_s,
        max_retries=settings.max_retries,
        retry_backoff_s=settings.retry_backoff_s,
    )
