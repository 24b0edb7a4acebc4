"""Exceptions in the form that Celery's requests take."""

from __future__ import annotations

from billiard.einfo import ExceptionInfo


def exception_info(error: BaseException) -> ExceptionInfo:
    """Billiard's ExceptionInfo of an exception, for `Request.on_failure`."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()
