"""Sends jobs to the queue: checked, once for each idempotency key, and only if the broker has room."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

from celery import Celery, states, uuid
from celery.backends.redis import RedisBackend
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from .availability import is_full
from .capacity import Capacity
from .errors import QueueFull
from .idempotency import IdempotencyKeys
from .payloads import Job, checked_size
from .protocol import HIDDEN, SUBMITTED_AT
from .redis_keys import results_prefix
from .setup_check import setup_check_of
from .trace_headers import trace_headers
from .webhooks import check_public


class SubmitOptions(TypedDict, total=False):
    """Options of Celery's `apply_async` that a job may have."""

    #: The job's id. Default: a random one.
    task_id: str
    #: Default: the client's.
    queue: str
    #: In the place of a queue: the name or the id of a model that workers serve (`Client.models`).
    model: str
    #: Seconds before it starts, or when.
    countdown: float
    eta: datetime
    #: Seconds, or a time, after which a job that has not started never starts.
    expires: float | datetime
    #: Signatures of tasks that run when it succeeds, with its result; and when it fails, with its id.
    link: Any
    link_error: Any
    headers: dict[str, Any]
    #: Hard and soft limit of its run, in seconds.
    time_limit: float
    soft_time_limit: float
    #: Whether and how sending is retried while the broker is away: see Celery's `retry_policy`.
    retry: bool
    retry_policy: dict[str, Any]
    ignore_result: bool
    compression: str
    shadow: str
    add_to_parent: bool
    group_id: str
    root_id: str
    parent_id: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A job's id, the queue that it was sent to, and its size in bytes."""

    id: str
    queue: str
    #: Of its arguments as JSON.
    size: int


class Submitter:
    """Sends jobs over an app. Safe to share between threads."""

    def __init__(self, app: Celery, capacity: Capacity, *, check_callbacks: bool, max_job_bytes: int) -> None:
        self._app = app
        self._capacity = capacity
        self._check_callbacks = check_callbacks
        self._max_job_bytes = max_job_bytes
        self._setup_check = setup_check_of(app)

    def submit(self, job: Job, queue: Any, priority: int, options: dict[str, Any]) -> Sent:
        """Queue a job, or find the one that has its idempotency key already. `queue`: its name, or kombu's object."""
        if self._check_callbacks and job.callback is not None:
            check_public(job.callback)
        arguments = job.arguments()
        size = checked_size(arguments, self._max_job_bytes)
        if job.idempotency_key is None or not isinstance(self._app.backend, RedisBackend):
            # Where the results are not in Redis, the workers hold to the key alone.
            return Sent(*self._send(job.task, arguments, queue, priority, options), size)
        backend, name = self._app.backend, getattr(queue, "name", queue)
        keys = IdempotencyKeys(backend.client, backend.expires, name, results_prefix(self._app))
        claim = keys.claim(job, options.pop("task_id", None) or uuid(), is_sent=False)
        if claim.is_started and self._app.backend.get_task_meta(claim.id, cache=False)["status"] == states.PENDING:
            claim = keys.claim_again(job, claim)
        if claim.is_sent:
            return Sent(claim.id, name, size)
        sent = self._send(job.task, arguments, queue, priority, {**options, "task_id": claim.id})
        keys.confirm(job, claim)
        return Sent(*sent, size)

    def _send(
        self, task: str, arguments: dict[str, Any], queue: Any, priority: int, options: dict[str, Any]
    ) -> tuple[str, str]:
        """The job's id, and the queue's name."""
        self._capacity.take(queue)
        self._setup_check.check_sending()
        with queue_full_if_full():
            result = self._app.send_task(
                task,
                kwargs=arguments,
                queue=queue,
                priority=priority,
                # Not the app's default serializer: the workers read JSON only.
                serializer="json",
                headers={SUBMITTED_AT: time.time(), **trace_headers(), **options.pop("headers", {})},
                **HIDDEN,
                **options,
            )
        return result.id, getattr(queue, "name", queue)


@contextlib.contextmanager
def queue_full_if_full() -> Iterator[None]:
    """Raises QueueFull for the error of a broker that is full."""
    try:
        yield
    except (OperationalError, ResponseError) as error:
        if is_full(error):
            raise QueueFull(
                f"The broker is full and refused the job ({error}): submit it later, add workers, "
                "or give the server more memory or disk."
            ) from error
        raise
