"""The log of one process: level, format and target; Celery's `--loglevel` and `--logfile`, else our settings.

A job's error concerns its producer, who finds it in the result, so the log has it in one line at INFO. Records at ERROR
are for the operator.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType
from typing import Any

import click
from celery.app.defaults import DEFAULTS
from celery.apps import worker as celery_worker
from click.core import ParameterSource

from config.logging import configure
from config.settings import PREFIX, Settings
from tasks.errors import JobError
from worker.observability.log_json import JsonLineFormatter
from worker.observability.log_lines import LineFormatter

logger = logging.getLogger(__name__)

#: Celery's settings about its own log, which `-- worker.NAME=VALUE` at the end of its command line sets.
_CELERY_OPTIONS = (
    "worker_log_color",
    "worker_log_format",
    "worker_redirect_stdouts",
    "worker_redirect_stdouts_level",
    "worker_task_log_format",
)


def set_up(settings: Settings, process: str, logfile: str | None = None) -> None:
    """Set up the log of this process: a receiver of Celery's signal `setup_logging`, in each process of a worker."""
    level = _commands_level() or settings.log_level
    # The model process reads its settings from the environment.
    os.environ[f"{PREFIX}LOG_LEVEL"] = level
    formatter = JsonLineFormatter(process) if settings.log_format == "json" else LineFormatter()
    configure(level, formatter, logfile).addFilter(_lower_job_errors)
    # At the logger too: other receivers of its records, such as Sentry, see them before our handler does.
    logging.getLogger("celery.worker.request").addFilter(_lower_job_errors)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_threads_end


def refusal(conf: Any) -> str | None:
    """Why a worker with these settings of Celery may not start: they would set up a log that is not used."""
    changed = [name for name in _CELERY_OPTIONS if conf[name] != DEFAULTS[name]]
    if not changed:
        return None
    return (
        f"{', '.join(changed)} cannot be set: the log of this worker is set by {PREFIX}LOG_FORMAT, {PREFIX}LOG_LEVEL, "
        "--loglevel and --logfile. Start it without."
    )


def use_for_all_lines(worker: Any, settings: Settings, process: str) -> None:
    """Have a worker of Celery print no plain lines, neither its banner nor those about signals, if the log is JSON."""
    if settings.log_format != "json":
        return
    worker.quiet = True
    formatter = JsonLineFormatter(process)
    # Until Celery sets up the log, which it does after its first warnings.
    logging.captureWarnings(True)
    configure(_commands_level() or settings.log_level, formatter)

    def say(message: str, stream: Any = None) -> None:
        record = logging.LogRecord(celery_worker.__name__, logging.INFO, "", 0, message, None, None)
        handler = logging.getLogger().handlers[0]
        if isinstance(handler, logging.StreamHandler) and logger.isEnabledFor(logging.INFO):
            # Celery calls it in signal handlers, where the stream may be in use.
            os.write(handler.stream.fileno(), f"{formatter.format(record)}\n".encode())

    celery_worker.safe_say = say


def _commands_level() -> str | None:
    """The level of `--loglevel`, if the command line has it. Celery's own default would be WARNING."""
    context = click.get_current_context(silent=True)
    if context is None or context.get_parameter_source("loglevel") is not ParameterSource.COMMANDLINE:
        return None
    level = context.params["loglevel"]
    name: str = level if isinstance(level, str) else logging.getLevelName(level)
    return {"FATAL": "CRITICAL"}.get(name.upper(), name.upper())


def _lower_job_errors(record: logging.LogRecord) -> bool:
    """Lower a job's error to INFO, without a traceback. Celery's consumer logs each failed job at ERROR."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(getattr(error, "exc", error), JobError):
        record.levelno, record.levelname, record.exc_info, record.exc_text = logging.INFO, "INFO", None, None
    return record.levelno >= logging.getLogger().level


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logger.critical("An error ends this process.", exc_info=(kind, error, traceback))


def _log_threads_end(ended: threading.ExceptHookArgs) -> None:
    if not issubclass(ended.exc_type, SystemExit) and ended.exc_value is not None:
        name = ended.thread.name if ended.thread else "unknown"
        logger.error(
            "A defect ends the thread %s.", name, exc_info=(ended.exc_type, ended.exc_value, ended.exc_traceback)
        )
