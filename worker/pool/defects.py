"""A decorator for callbacks of the event loop: an exception is logged and does not end the loop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from celery.exceptions import WorkerShutdown

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def log_defects(function: F) -> F:
    """Log an exception and return None: one that left a callback would end the worker's event loop."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (WorkerShutdown, MemoryError):
            raise
        except Exception:
            logger.exception("A defect in %s; the worker goes on.", function.__name__)
            return None

    return call  # type: ignore[return-value]
