"""What a monitor hears of a broker's workers."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from celery import Celery
from redis.exceptions import RedisError

from tests.support.waiting import PATIENCE_S


class Events:
    """Every event of a broker, as text."""

    def __init__(self, app: Celery) -> None:
        self.seen: list[dict[str, Any]] = []
        self._app = app
        self._ready = threading.Event()
        threading.Thread(target=self._capture, daemon=True).start()
        assert self._ready.wait(PATIENCE_S)

    def of(self, id: str) -> set[str]:
        return {event["type"] for event in self.seen if event.get("uuid") == id}

    def _capture(self) -> None:
        # Until the broker ends.
        with contextlib.suppress(OSError, RedisError), self._app.connection() as connection:
            receiver = self._app.events.Receiver(connection, handlers={"*": self.seen.append})
            with receiver.consumer_context():
                self._ready.set()
                for _ in receiver.consume(limit=None, timeout=None, wakeup=False):
                    pass
