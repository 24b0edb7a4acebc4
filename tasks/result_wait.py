"""Waiting for a job's result, also through a restart of Redis."""

from __future__ import annotations

import math
import time

from celery import Celery
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .broker_errors import with_our_errors
from .errors import JobTimeout
from .outcomes import Outcome
from .setup_check import setup_check_of
from .stored_results import read_state

#: Seconds between two polls of a result: short at first, since most jobs end within a second. They grow so that the
#: delay of an answer is at most a tenth of its time.
FIRST_PAUSE_S, LAST_PAUSE_S, PAUSE_GROWTH = 0.01, 0.25, 1.1
#: Seconds for which a wait continues while the results' Redis is away: enough for a restart.
AWAY_S = 60.0
#: Seconds between two checks of whether an answer can come.
CHECK_S = 2.0


class ResultWait:
    """A wait for a job's end: polls its result, with growing pauses.

    AsyncResult.get() uses one subscription for all results of a process: threads that wait at the same time, as in a
    web server, take messages from each other.
    """

    def __init__(self, app: Celery, id: str, queue: str | None, timeout: float | None) -> None:
        self._app = app
        self._id = id
        self._queue = queue
        self._timeout = timeout
        self._pause_s = FIRST_PAUSE_S
        self._setup_check = setup_check_of(app)
        now = time.monotonic()
        self._end = math.inf if timeout is None else now + timeout
        self._answered_at = now
        #: The error of the last poll, while Redis is away.
        self._away: RedisError | None = None
        self._checked_at = now
        #: The job's state in Celery when it was last read; None before.
        self.state: str | None = None

    @with_our_errors
    def poll(self) -> Outcome | None:
        """The job's outcome; None if it has not ended.

        Raises JobTimeout after the timeout, BrokerUnavailable if Redis is away then or has been for AWAY_S, and
        ConfigurationError if no answer can come.
        """
        outcome = self._outcome()
        if outcome is None:
            self._check()
        return outcome

    def _check(self) -> None:
        now = time.monotonic()
        if self._away is not None and (now >= self._end or now - self._answered_at > AWAY_S):
            raise self._away
        if now >= self._end:
            why = self._setup_check.why_no_answer(self._queue)
            raise JobTimeout(f"Job {self._id} has no answer after {self._timeout} s, and goes on. {why}")
        if now - self._checked_at >= CHECK_S:
            self._checked_at = now
            self._setup_check.check_reading()

    def _outcome(self) -> Outcome | None:
        try:
            self.state, outcome = read_state(self._app, self._id)
        except (RedisConnectionError, RedisTimeoutError) as error:
            self._away = error
            return None
        self._away, self._answered_at = None, time.monotonic()
        return outcome

    def pause_s(self) -> float:
        """Seconds until the next poll."""
        pause, self._pause_s = self._pause_s, min(self._pause_s * PAUSE_GROWTH, LAST_PAUSE_S)
        return min(pause, self.left_s)

    @property
    def left_s(self) -> float:
        """Seconds until the timeout."""
        return max(0.0, self._end - time.monotonic())
