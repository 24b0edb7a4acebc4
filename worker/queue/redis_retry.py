"""Retries of calls to a Redis that is away or refuses, in the model process.

A job thread retries, with pauses, for up to IDEFICS_REDIS_WAIT_S; then its message returns to the queue. This applies
to everything that a job reads, stores or publishes, so nothing of it is lost. The parent process never waits, since its
event loop must handle signals: there the error is raised at once, and the job returns to the queue.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import redis
from redis.client import Pipeline

from tasks.availability import is_away, is_demoted
from worker.runtime import gil

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Connections to the results' Redis, and as many to the broker for callbacks, that all job threads share.
CONNECTIONS = 8

#: Seconds before the second attempt, and at most between two attempts.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
#: Seconds between two log lines about waiting.
LOG_INTERVAL_S = 30.0


class RedisAway(BaseException):
    """Redis stayed away for longer than a job waits: the job's message returns to the queue.

    Not an Exception: it passes through code of Celery's that would end the job, its chord or its retry for any
    Exception.
    """


class _Waiting:
    """Whether and for how long this process waits."""

    def __init__(self) -> None:
        #: Seconds; 0: it does not wait.
        self.max_wait_s = 0.0
        self.on_wait: Callable[[float], None] = lambda seconds: None
        self.logged_at = float("-inf")


_waiting = _Waiting()


def enable(seconds: float, on_wait: Callable[[float], None]) -> None:
    """Let this process's threads wait. `on_wait` is called in a waiting thread with the seconds since its last call."""
    _waiting.max_wait_s = seconds
    _waiting.on_wait = on_wait


def max_wait_s() -> float:
    """Seconds that a call may wait; 0 in a process that does not wait."""
    return _waiting.max_wait_s


def is_enabled() -> bool:
    return _waiting.max_wait_s > 0


def with_retries(call: Callable[[], T], reconnect: Callable[[], None] | None = None) -> T:
    """Call Redis, repeatedly while it is away. Raises RedisAway after IDEFICS_REDIS_WAIT_S, and other errors at once.

    `reconnect` is called after a failover, since the host's name may then lead to another server.
    """
    started = time.monotonic()
    waited_until, pause = started, FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:
            if not is_enabled() or not is_away(error):
                raise
            if time.monotonic() - started > _waiting.max_wait_s:
                raise RedisAway(str(error)) from error
            _log(error)
            is_elsewhere = is_demoted(error)
        with gil.released():
            time.sleep(pause * random.uniform(0.7, 1.0))  # noqa: S311 - spreads the threads' attempts
        waited_until, before = time.monotonic(), waited_until
        _waiting.on_wait(waited_until - before)
        pause = min(2 * pause, MAX_PAUSE_S)
        if reconnect is not None and is_elsewhere:
            reconnect()


def _log(error: Exception) -> None:
    now = time.monotonic()
    if now - _waiting.logged_at >= LOG_INTERVAL_S:
        _waiting.logged_at = now
        logger.error("Redis is away or refuses (%s): jobs wait for it.", error)


class _ConnectionLimit:
    """Limits the connections in use. A thread that waits for one releases its GIL permit meanwhile."""

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            with gil.released():
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release()


class RetryingRedis(redis.Redis):
    """A client for all job threads, which retries. All our commands may be sent twice."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limit = _ConnectionLimit(CONNECTIONS)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return with_retries(functools.partial(self._execute_once, args, options), self.reconnect)

    def _execute_once(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        with self._limit.one():
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return _RetryingPipeline(self, transaction, shard_hint)

    def reconnect(self) -> None:
        self.connection_pool.disconnect(inuse_connections=False)

    def once(self, call: Callable[[], T]) -> T:
        """Make a call that uses one connection, without retries."""
        with self._limit.one():
            return call()


class _RetryingPipeline(Pipeline):
    """A pipeline that is retried as a whole."""

    def __init__(self, client: RetryingRedis, transaction: bool, shard_hint: Any) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, shard_hint)
        self._client = client

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands, scripts = list(self.command_stack), set(self.scripts)

        def execute() -> list[Any]:
            # An attempt empties both.
            self.command_stack, self.scripts = list(commands), set(scripts)
            return super(_RetryingPipeline, self).execute(raise_on_error)

        return with_retries(functools.partial(self._client.once, execute), self._client.reconnect)
