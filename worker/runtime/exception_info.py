"""Errors in the form in which Celery's requests take them."""

from __future__ import annotations

from billiard.einfo import ExceptionInfo


def exception_info(error: BaseException) -> ExceptionInfo:
    """An error with the traceback of this call, for `Request.on_failure`."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()
