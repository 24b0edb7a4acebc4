"""Reads and deletes results in Celery's result backend, for one job or many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Celery, states
from celery.backends.redis import RedisBackend
from pydantic import ValidationError

from .errors import ConfigurationError, Internal, JobCanceled, from_exception
from .outcomes import Outcome
from .results import Result
from .setup_check import unreadable


def readable_backend(app: Celery) -> Any:
    """An app's result backend. Raises ConfigurationError for one that workers do not answer at."""
    if wrong := unreadable(app.backend):
        raise ConfigurationError(wrong)
    return app.backend


def read_state(app: Celery, id: str) -> tuple[str, Outcome | None]:
    """A job's state in Celery, and its outcome; None if it has not ended."""
    record = readable_backend(app).get_task_meta(id)
    return record["status"], _outcome(record) if _has_ended(record) else None


def read_outcomes(app: Celery, ids: Iterable[str]) -> dict[str, Outcome]:
    """The outcomes of the jobs among these that have ended; from Redis in one command."""
    asked, backend = list(ids), readable_backend(app)
    if not asked:
        return {}
    if isinstance(backend, RedisBackend):
        found = backend.client.mget([backend.get_key_for_task(id) for id in asked])
        records = [raw and backend.meta_from_decoded(backend.decode(raw)) for raw in found]
    else:
        records = [backend.get_task_meta(id, cache=False) for id in asked]
    return {id: _outcome(record) for id, record in zip(asked, records, strict=True) if record and _has_ended(record)}


def forget(app: Celery, ids: Iterable[str]) -> None:
    """Delete these jobs' results."""
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        for id in ids:
            backend.forget(id)
        return
    keys = {id: backend.get_key_for_task(id) for id in ids}
    if keys:
        backend.client.delete(*keys.values())
    for id in keys:
        backend.result_consumer.cancel_for(id)


def _has_ended(record: dict[str, Any]) -> bool:
    return record["status"] in states.READY_STATES


def _outcome(record: dict[str, Any]) -> Outcome:
    """The outcome in the record of a job that has ended."""
    if record["status"] == states.REVOKED:
        return JobCanceled(partial=_partial(record["result"]))
    if isinstance(record["result"], BaseException):
        return from_exception(record["result"])
    try:
        return Result.model_validate(record["result"])
    except ValidationError:
        return Internal("The stored result is not one of the six tasks': check the id.", detail="foreign_result")


def _partial(revoked: BaseException) -> Result | None:
    """The result so far that the worker stored with a revocation, after Celery's reason; None without one."""
    return Result.model_validate(revoked.args[1]) if len(revoked.args) > 1 else None
