"""Records the callback of a job that has ended as a delivery in the outbox, from where the callbacks worker sends it.

The order is: the result is stored, the delivery recorded, the message acknowledged. A process that is killed in between
leaves the message unacknowledged; it is delivered again, and the delivery is recorded then. All cases are in
docs/decisions/0006-callbacks.md.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from celery import Celery, states
from pydantic import ValidationError

from config.settings import Settings
from tasks import webhooks
from tasks.errors import InvalidRequest, from_exception
from tasks.outbox import Delivery, Outbox, OutboxBounds, connect, delivery_id
from tasks.payload_fields import checked_metadata
from tasks.payloads import Callback
from tasks.redis_keys import broker_prefix
from worker.delivery.callback_policy import check
from worker.observability import tracing
from worker.observability.job_fields import job_extra
from worker.queue.redis_retry import RetryingRedis, with_retries
from worker.queue.result_backend import is_of_another

logger = logging.getLogger(__name__)

EVENTS: dict[str, webhooks.JobEvent] = {
    states.SUCCESS: "job.succeeded",
    states.FAILURE: "job.failed",
    states.REVOKED: "job.canceled",
}

#: SUCCESS, FAILURE or REVOKED, and the job's result or exception.
TerminalState: TypeAlias = tuple[str, Any]

#: Seconds between two log lines about callbacks that were given up.
LOG_INTERVAL_S = 60.0


class GivenUpLog:
    """Logs how many pending callbacks were given up, once per LOG_INTERVAL_S at most. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: Given up since the last log line.
        self._count = 0
        self._next_at = -math.inf

    def add(self, host: str, count: int) -> None:
        """Count callbacks that were given up for a new one to `host`."""
        with self._lock:
            self._count += count
            now = self._clock()
            if now < self._next_at:
                return
            count, self._count = self._count, 0
            self._next_at = now + LOG_INTERVAL_S
        logger.error(
            "%d callbacks were given up unsent, the oldest first, the last ones for a new one to %s: more are pending "
            "than IDEFICS_CALLBACK_MAX_HOST_BYTES or IDEFICS_CALLBACK_MAX_PENDING_BYTES allow. `idefics-jobs "
            "deliveries hosts` lists their hosts; `idefics-jobs deliveries replay` sends them again.",
            count,
            host,
        )


class CallbackRecorder:
    """Records the callbacks of jobs that have ended. Thread-safe."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        #: Made at the first use: not when `worker.app` is imported.
        self._outbox: Outbox | None = None
        self._given_up = GivenUpLog()
        self._lock = threading.Lock()

    def record(
        self,
        id: str,
        task: str,
        arguments: Mapping[str, Any],
        terminal_state: TerminalState,
        *,
        is_stored: bool,
        digest: str = "",
    ) -> None:
        """Record the callback of a job that has ended, if it has one. A second call for the same end changes nothing.

        With `is_stored`, a stored terminal state takes precedence over `terminal_state`: another run may have been
        first. One of another submission under the same id, which has a digest other than `digest`, is ignored. Raises
        one of UNAVAILABLE, or in a job's own thread RedisAway after waiting.
        """
        callback = self._callback(id, task, arguments)
        if callback is None:
            return
        state, value, ended_at = self._stored(id, terminal_state, digest) if is_stored else (*terminal_state, None)
        event = EVENTS.get(state)
        if event is None or (callback.events and event not in callback.events):
            return
        body = webhooks.body(
            event, ended_at or datetime.now(UTC).isoformat(), job_data(id, task, arguments, state, value)
        )
        # Jobs with the same id may end several times: each end has its own delivery.
        key = delivery_id(id, event, digest, ended_at or "")
        delivery = Delivery(key, id, event, callback.url, callback.key_id, body, traces=tracing.traceparent())
        self._connected().add(delivery, self._settings.callback_batch_window_s)

    def _callback(self, id: str, task: str, arguments: Mapping[str, Any]) -> Callback | None:
        """The job's callback, if the policy allows it: a job with a forbidden one has failed for that reason."""
        if not arguments.get("callback"):
            return None
        try:
            callback = Callback.model_validate(arguments["callback"])
            # Without a lookup: a failure of DNS at this moment would lose the callback. Each attempt looks it up.
            check(callback, self._settings, look_up=False)
        except (ValidationError, InvalidRequest) as error:
            why = error if isinstance(error, InvalidRequest) else "malformed"
            job = job_extra(id, task, InvalidRequest.code)
            logger.info("The callback of job %s is not recorded: %s", id, why, extra=job)
            return None
        return callback

    def _stored(self, id: str, terminal_state: TerminalState, digest: str) -> tuple[str, Any, str | None]:
        """The stored state, value and time in ISO 8601; the given terminal state where none of the job's is stored."""
        meta = self._app.backend.get_task_meta(id, cache=False)
        if meta["status"] not in states.READY_STATES or is_of_another(meta, digest):
            return (*terminal_state, None)
        return meta["status"], meta["result"], meta.get("date_done")

    def _connected(self) -> Outbox:
        if self._outbox is None:
            bounds = OutboxBounds(
                self._settings.callback_max_host_bytes,
                self._settings.callback_max_pending_bytes,
                self._settings.callback_keep_s,
            )
            client = with_retries(lambda: connect(self._app, RetryingRedis))
            outbox = Outbox(client, bounds, self._given_up.add, broker_prefix(self._app))
            with self._lock:
                self._outbox = self._outbox or outbox
        return self._outbox


def job_data(id: str, task: str, arguments: Mapping[str, Any], state: str, value: Any) -> dict[str, Any]:
    """The event's data: `value` is the job's result or exception."""
    data: dict[str, Any] = {"id": id, "task": task, "result": None, "error": None}
    if state == states.SUCCESS:
        data["result"] = value
    elif state == states.FAILURE and isinstance(value, BaseException):
        data["error"] = from_exception(value).as_dict()
    elif isinstance(value, BaseException) and len(value.args) > 1:
        # The result so far of a canceled job.
        data["result"] = value.args[1]
    return {**data, "metadata": _metadata(arguments), "truncated": []}


def _metadata(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The job's metadata, if valid: a job may have failed because it is not."""
    metadata = arguments.get("metadata")
    try:
        return checked_metadata(metadata) if isinstance(metadata, dict) else {}
    except ValueError:
        return {}
