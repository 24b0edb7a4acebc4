"""Says in Redis what this worker reads, for clients (`tasks/worker_options.py`)."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery import bootsteps

from tasks.availability import is_away
from tasks.outbox import connect
from tasks.worker_options import RENEW_S, WorkerOptions, publish

logger = logging.getLogger(__name__)


class AnnouncedOptions(bootsteps.StartStopStep):  # type: ignore[misc]
    """Renews the keys in a thread, since the event loop must not wait for Redis; they expire after the worker's end."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        threading.Thread(target=self._renew, args=[worker.app], daemon=True, name="announced-options").start()

    def _renew(self, app: Any) -> None:
        options, broker, told = WorkerOptions.of(app), None, False
        while True:
            try:
                broker = broker or connect(app)
                publish(app, options, broker)
            except Exception as error:
                if not told and not is_away(error):
                    logger.warning("What this worker reads cannot be said to clients: %s", error)
                    told = True
            time.sleep(RENEW_S)
