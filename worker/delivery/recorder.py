"""From a job's end to the delivery of its callback: recorded after the result is stored and before the message is
acknowledged, so that whatever is killed in between, the message comes again and the delivery is recorded then.

docs/decisions/0006-callbacks.md has the cases.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from celery import Celery, states
from pydantic import ValidationError

from config.settings import Settings
from tasks import webhooks
from tasks.errors import InvalidRequest, from_exception
from tasks.outbox import Bounds, Delivery, Outbox, connect, delivery_id
from tasks.payloads import Callback, checked_metadata
from worker.delivery.policy import check
from worker.queue.patience import PatientRedis, patiently
from worker.queue.result_backend import is_of_another

logger = logging.getLogger(__name__)

EVENTS: dict[str, webhooks.JobEvent] = {
    states.SUCCESS: "job.succeeded",
    states.FAILURE: "job.failed",
    states.REVOKED: "job.canceled",
}

#: A job's state, and its result or exception.
TerminalState: TypeAlias = tuple[str, Any]

#: Seconds between two log lines about callbacks that were given up.
TOLD_S = 60.0


class GivenUp:
    """Logs that pending callbacks were given up, at most once in TOLD_S."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._tells_at = 0.0

    def tell(self, host: str, count: int) -> None:
        with self._lock:
            self._count += count
            if time.monotonic() < self._tells_at:
                return
            count, self._count = self._count, 0
            self._tells_at = time.monotonic() + TOLD_S
        logger.error(
            "%d callbacks were given up unsent, the oldest ones, at last for a new one to %s: more are pending than "
            "IDEFICS_CALLBACK_MAX_HOST_BYTES or IDEFICS_CALLBACK_MAX_PENDING_BYTES. `idefics-jobs deliveries hosts` "
            "says where to; `deliveries replay` sends them again.",
            count,
            host,
        )


class Announcer:
    """Records the deliveries of jobs that have ended. Used by many threads at once."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._outbox: Outbox | None = None
        self._given_up = GivenUp()
        self._lock = threading.Lock()

    def announce(
        self, id: str, task: str, arguments: Mapping[str, Any], end: TerminalState, *, is_stored: bool, asked: str = ""
    ) -> None:
        """Record the delivery of a job's end, once. Nothing for a job without a callback.

        Where the end is stored, the stored one counts: another one may have been first. That of another submission
        under its id, with another digest than `asked`, does not. Raises one of UNAVAILABLE, and in a job's own thread
        RedisAway, after it has waited.
        """
        callback = self._callback(id, arguments)
        if callback is None:
            return
        state, value, ended = self._stored(id, end, asked) if is_stored else (*end, None)
        event = EVENTS.get(state)
        if event is None or (callback.events and event not in callback.events):
            return
        body = webhooks.body(event, ended or datetime.now(UTC).isoformat(), _data(id, task, arguments, state, value))
        # Of all ends of jobs with this id, this one.
        key = delivery_id(id, event, asked, ended or "")
        record = Delivery(key, id, event, callback.url, callback.key_id, body)
        self._connected().add(record, self._settings.callback_batch_window_s)

    def _callback(self, id: str, arguments: Mapping[str, Any]) -> Callback | None:
        """The job's, if it may be called: a job with another one has been refused."""
        if not arguments.get("callback"):
            return None
        try:
            callback = Callback.model_validate(arguments["callback"])
            # What the name service says this very moment would lose it; the attempts ask for themselves.
            check(callback, self._settings, look_up=False)
        except (ValidationError, InvalidRequest) as error:
            logger.info("Job %s calls nobody back: %s", id, error if isinstance(error, InvalidRequest) else "malformed")
            return None
        return callback

    def _stored(self, id: str, end: TerminalState, asked: str) -> tuple[str, Any, str | None]:
        meta = self._app.backend.get_task_meta(id, cache=False)
        if meta["status"] not in states.READY_STATES or is_of_another(meta, asked):
            return (*end, None)
        return meta["status"], meta["result"], meta.get("date_done")

    def _connected(self) -> Outbox:
        if self._outbox is None:
            bounds = Bounds(
                self._settings.callback_max_host_bytes,
                self._settings.callback_max_pending_bytes,
                self._settings.callback_keep_s,
            )
            outbox = Outbox(patiently(lambda: connect(self._app, PatientRedis)), bounds, self._given_up.tell)
            with self._lock:
                self._outbox = self._outbox or outbox
        return self._outbox


def _data(id: str, task: str, arguments: Mapping[str, Any], state: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"id": id, "task": task, "result": None, "error": None}
    if state == states.SUCCESS:
        data["result"] = value
    elif state == states.FAILURE and isinstance(value, BaseException):
        data["error"] = from_exception(value).as_dict()
    elif isinstance(value, BaseException) and len(value.args) > 1:
        # A cancellation's text so far.
        data["result"] = value.args[1]
    return {**data, "metadata": _metadata(arguments), "truncated": []}


def _metadata(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A job may have been refused for it."""
    metadata = arguments.get("metadata")
    try:
        return checked_metadata(metadata) if isinstance(metadata, dict) else {}
    except ValueError:
        return {}
