"""The target and level of a worker's log: Celery's `--loglevel` and `--logfile`, else our settings.

A job's error concerns its producer, who finds it in the result, so the log has it in one line at INFO. Records at ERROR
are for the operator.
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

#: Errors of a job that are not the worker's fault.
EXPECTED: tuple[type[JobError], ...] = tuple(error for error in ERRORS.values() if error is not Internal)


def set_up(default_level: str, logfile: str | None) -> None:
    """Set up logging: a receiver of Celery's signal `setup_logging`, in each process of a worker."""
    level = _commands_level() or default_level
    # The model process reads its settings from the environment.
    os.environ[f"{PREFIX}LOG_LEVEL"] = level
    handler = configure(level, LineFormatter(), logfile)
    handler.addFilter(_lower_expected_errors)


def _commands_level() -> str | None:
    """The level of `--loglevel`, if the command line has it. Celery's own default would be WARNING."""
    context = click.get_current_context(silent=True)
    if context is None or context.get_parameter_source("loglevel") is not ParameterSource.COMMANDLINE:
        return None
    level = context.params["loglevel"]
    name: str = level if isinstance(level, str) else logging.getLevelName(level)
    return {"FATAL": "CRITICAL"}.get(name.upper(), name.upper())


def _lower_expected_errors(record: logging.LogRecord) -> bool:
    """Lower expected errors to INFO, without a traceback. Celery's consumer logs each failed job at ERROR."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(getattr(error, "exc", error), EXPECTED):
        record.levelno, record.levelname, record.exc_info, record.exc_text = logging.INFO, "INFO", None, None
    return record.levelno >= logging.getLogger().level
