"""The level and destination of a worker's log: Celery's `--loglevel` and `--logfile`, else our settings.

A job's error concerns its producer, who reads it in the result: in the log it is one line, at INFO. Records at ERROR
need the operator.
"""

from __future__ import annotations

import logging
import os

import click
from click.core import ParameterSource

from config.logging import configure
from config.settings import PREFIX
from tasks.errors import ERRORS, Internal, JobError
from worker.observability.log_lines import LineFormatter

#: Errors of jobs that do not mean a defect of the worker.
EXPECTED: tuple[type[JobError], ...] = tuple(error for error in ERRORS.values() if error is not Internal)


def set_up(default_level: str, logfile: str | None) -> None:
    """For Celery's signal `setup_logging`, in each of a worker's processes."""
    level = _commands_level() or default_level
    # The model process reads its settings from here.
    os.environ[f"{PREFIX}LOG_LEVEL"] = level
    handler = configure(level, LineFormatter(), logfile)
    handler.addFilter(_expected_errors_are_news)


def _commands_level() -> str | None:
    """`--loglevel`, if the command line has it; Celery's own default, WARNING, is not used."""
    context = click.get_current_context(silent=True)
    if context is None or context.get_parameter_source("loglevel") is not ParameterSource.COMMANDLINE:
        return None
    level = context.params["loglevel"]
    name: str = level if isinstance(level, str) else logging.getLevelName(level)
    return {"FATAL": "CRITICAL"}.get(name.upper(), name.upper())


def _expected_errors_are_news(record: logging.LogRecord) -> bool:
    """Lower a job's failure to INFO: Celery's consumer logs it as an error, with its traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(getattr(error, "exc", error), EXPECTED):
        record.levelno, record.levelname, record.exc_info, record.exc_text = logging.INFO, "INFO", None, None
    return record.levelno >= logging.getLogger().level
