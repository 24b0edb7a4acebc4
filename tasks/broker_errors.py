"""Converts errors of Redis and kombu to our own errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from .errors import IdeficsError, from_broker

P = ParamSpec("P")
R = TypeVar("R")


def with_our_errors(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator: errors of Redis and kombu that leave the method are IdeficsErrors too."""

    @functools.wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return method(*args, **options)
        except IdeficsError:
            raise
        except (OperationalError, RedisError) as error:
            ours = from_broker(error)
            if hasattr(error, "submitted"):
                ours.submitted = error.submitted  # type: ignore[attr-defined]
            raise ours from error

    return call
