"""Logging for both processes of a worker: destination, level, quiet libraries.

The format of the lines is set by `worker/observability/log_lines.py`.
"""

from __future__ import annotations

import logging
import sys
from logging.handlers import WatchedFileHandler

#: Libraries that log each request, or warn about our own choices. Celery's pool logs jobs' arguments at DEBUG.
QUIET = ("PIL", "httpx", "filelock", "accelerate", "bitsandbytes", "celery.pool", "celery.redirected")


def configure(level: str, formatter: logging.Formatter, file: str | None = None) -> logging.Handler:
    """Log records from `level` on go to standard error, or to a file, which may be rotated. Returns the handler."""
    handler = WatchedFileHandler(file) if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return handler
