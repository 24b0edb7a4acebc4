"""The job that a log record is about: its id, its task, and the code of its error.

A thread that works on one job says so once with `about_job`; then all its records are about that job, those of
libraries too. A single record of another thread says so with `extra=job_extra(...)`. Celery's own records about a job
carry its id and task themselves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

#: The names of the fields, in their order.
FIELDS = ("job_id", "task", "code")

#: Messages of Celery about one job, and what their arguments are.
_CELERYS_ARGUMENTS = {
    "Discarding revoked task: %s[%s]": ("task", "job_id"),
    "Task accepted: %s[%s] pid:%r": ("task", "job_id"),
    "Terminating %s (%s)": ("job_id",),
}

#: The fields of the job that this thread works on. Celery's tracer adds the code when the job fails.
_current: ContextVar[dict[str, str | None] | None] = ContextVar("job_fields", default=None)


@contextlib.contextmanager
def about_job(id: str, task: str | None = None, code: str | None = None) -> Iterator[None]:
    """In the block, this thread's log records are about a job."""
    token = _current.set({"job_id": id, "task": task, "code": code})
    try:
        yield
    finally:
        _current.reset(token)


def note_code(code: str) -> None:
    """The job that this thread works on has failed with this code."""
    fields = _current.get()
    if fields is not None:
        fields["code"] = code


def current_code() -> str:
    """The code that was noted for this thread's job; empty if there is none."""
    return (_current.get() or {}).get("code") or ""


def job_extra(id: str, task: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The argument `extra` of a log call about a job."""
    return {"job_fields": {"job_id": id, "task": task, "code": code}}


def job_fields(record: logging.LogRecord) -> dict[str, str]:
    """The fields of the job that a record is about; none if it is about no job.

    To be called in the thread that logged it, as a handler is.
    """
    found: dict[str, str] = {}
    for fields in (_celerys(record), _current.get(), getattr(record, "job_fields", None)):
        if fields:
            found.update((name, str(value)) for name in FIELDS if (value := fields.get(name)))
    return found


def _celerys(record: logging.LogRecord) -> Mapping[str, Any]:
    """The job of one of Celery's own records, which has it in `data` or among its arguments."""
    if not record.name.startswith("celery."):
        return {}
    data = getattr(record, "data", None)
    if isinstance(data, dict):
        return {"job_id": data.get("id"), "task": data.get("name")}
    names = _CELERYS_ARGUMENTS.get(str(record.msg), ())
    return dict(zip(names, record.args, strict=False)) if isinstance(record.args, tuple) else {}
