"""Whether an error means that Redis is away or refuses for a while. Such calls are retried; others are defects."""

from __future__ import annotations

import errno
import re
import socket

from celery.exceptions import BackendError
from kombu.exceptions import LimitExceeded, OperationalError
from redis.exceptions import (
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

#: Errors of a server that is full, read-only, cut off from its replicas, loading or busy. Redis before 7 puts the place
#: in a script before the error.
_CODES = "OOM|MISCONF|READONLY|NOREPLICAS|LOADING|MASTERDOWN|CLUSTERDOWN|BUSY|TRYAGAIN"
_REFUSAL = re.compile(rf"(?:(?:ERR )?Error running script \(call to \w+\): @user_script:\s*\d+: -?)?(?:{_CODES})\b")
#: redis-py removes the codes that it knows from the message, and has classes for them.
_REFUSAL_CLASSES = (OutOfMemoryError, ReadOnlyError, ClusterDownError, MasterDownError, TryAgainError)
#: redis-py puts a pipeline's command, which has untrusted text, before the server's answer.
_OF_A_PIPELINE = "of pipeline caused error: "

#: Errors of the operating system: a temporary shortage, or a network that is away.
_ERRNOS = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN, errno.EINTR),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EPIPE),
    }
)

#: Exceptions of other libraries that have Redis's own as their cause.
_WRAPPERS = (OperationalError, BackendError)
#: Temporary errors that keep something from being stored in Redis.
UNAVAILABLE = (RedisError, OperationalError, OSError, BackendError)
_AWAY = (RedisConnectionError, RedisTimeoutError, InvalidResponse, LimitExceeded, *_WRAPPERS)
#: Nested causes that are followed: no library wraps deeper.
_MAX_DEPTH = 8


def is_away(error: BaseException) -> bool:
    """True for an error of a Redis that is away or refuses temporarily; False for one that would always recur."""
    for _ in range(_MAX_DEPTH):
        cause = error.__cause__ or error.__context__
        if not isinstance(error, _WRAPPERS) or cause is None:
            break
        error = cause
    if isinstance(error, ResponseError):
        return _refuses(error)
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or error.errno in _ERRNOS
    return isinstance(error, _AWAY)


def _refuses(error: ResponseError) -> bool:
    return isinstance(error, _REFUSAL_CLASSES) or bool(_REFUSAL.match(_answer(error)))


def _answer(error: BaseException) -> str:
    """The server's answer in an error's message."""
    return str(error).rpartition(_OF_A_PIPELINE)[2]


def without_command(error: BaseException) -> BaseException:
    """The same error, its message without the pipeline's command: that holds a part of a payload."""
    if _OF_A_PIPELINE in str(error):
        error.args = (_answer(error),)
    return error


def is_demoted(error: BaseException) -> bool:
    """True if the server answers that it is no longer the primary: its name may lead to another server now."""
    return isinstance(error, ReadOnlyError | MasterDownError) or (
        isinstance(error, ResponseError) and any(code in str(error) for code in ("READONLY", "NOREPLICAS"))
    )


def is_full(error: BaseException) -> bool:
    """True if the server's memory or disk is full."""
    cause = error.__cause__ or error
    return isinstance(cause, OutOfMemoryError) or (
        isinstance(cause, ResponseError) and _answer(cause).startswith("MISCONF")
    )
