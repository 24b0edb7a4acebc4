"""Redaction of unexpected errors for the log, since their messages may contain parts of a job."""

from __future__ import annotations

import traceback

from worker.observability.log_lines import Lines


def without_values(error: BaseException) -> Lines:
    """An error's class and traceback, but not its message, which may contain a prompt or URL (`KeyError: 'secret'`)."""
    return Lines(f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}")
