"""Unexpected errors for the log, redacted: their messages may contain parts of a job (`KeyError: 'secret'`)."""

from __future__ import annotations

import logging
from types import TracebackType

from tasks.errors import Internal
from worker.observability.job_fields import job_extra


def without_message(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """The argument `exc_info` of a log call: an error's class and traceback, without its message and its causes."""
    kind = type(error)
    # The error itself stays as it is: its caller may need the message.
    bare = type(kind.__name__, (Exception,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    return bare, bare(), error.__traceback__


def log_defect(logger: logging.Logger, error: BaseException, id: str, task: str | None = None) -> None:
    """Log the defect by which a job fails as `internal`."""
    logger.error(
        "Job %s hit a defect; it fails as internal.",
        id,
        exc_info=without_message(error),
        extra=job_extra(id, task, Internal.code),
        stacklevel=2,
    )
