"""Whether both Redis servers can be used, checked before a worker is ready.

The worker waits for a server that is away. A server that can never be used (no such database, no such user, no TLS)
ends the start, with the cure: otherwise each job would retry for minutes, and its worker would not stop meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery, bootsteps
from celery.exceptions import ImproperlyConfigured, WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from tasks.availability import is_away

logger = logging.getLogger(__name__)

#: Seconds between two attempts, and between two log lines about a server that is away.
RETRY_S = 0.5
LOG_INTERVAL_S = 10.0
#: Seconds between two polls of the check's state.
POLL_INTERVAL_S = 0.05

_CURES = (
    ("db index", "the database's number is beyond the server's `databases`: use a lower one, or raise it there"),
    (
        "select is not allowed",
        "the server is a cluster, which has database 0 only and cannot be used: take a plain one",
    ),
    ("certificate_verify_failed", "the certificate is not that of a host which ssl_ca_certs vouches for"),
    ("wrong_version_number", "the server speaks no TLS: use redis://, or its TLS port"),
    ("record layer failure", "the server speaks no TLS: use redis://, or its TLS port"),
)


def cure(error: BaseException) -> str | None:
    """What to correct, for an error that waiting does not cure; None for a server that is away."""
    for cause in _chain(error):
        said = str(cause)
        known = next((cure for sign, cure in _CURES if sign in said.lower()), None)
        if known:
            return f"{known} ({said})"
        if isinstance(cause, AuthenticationError) or said.startswith(("NOAUTH", "WRONGPASS")):
            return f"the user or the password is wrong: correct them in the URL ({said})"
        if isinstance(cause, NoPermissionError | ImproperlyConfigured):
            return said
        if isinstance(cause, ResponseError) and not is_away(cause):
            return said
    return None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


class RedisCheck:
    """Pings each server in its own thread until it answers or is found unusable. Thread-safe."""

    def __init__(self, pings: Mapping[str, Callable[[], Any]]) -> None:
        """`pings`: by a server's name, a call that raises where it does not answer."""
        self._calls = dict(pings)
        #: Why servers have not answered, by their names.
        self._away = dict.fromkeys(pings, "it has not answered yet")
        self._wrong: dict[str, str] = {}
        self._is_over = False

    def start(self) -> None:
        for name in self._calls:
            threading.Thread(target=self._ask, args=[name], name=f"check-{name}", daemon=True).start()

    def stop(self) -> None:
        self._is_over = True

    @property
    def have_answered(self) -> bool:
        return not self._away

    @property
    def missing(self) -> str:
        """Which servers have not answered, and why."""
        return "; ".join(f"{name}: {why}" for name, why in list(self._away.items()))

    @property
    def wrong(self) -> str:
        """Which servers can never be used, and why; empty without one."""
        return " ".join(f"{name}: {why}." for name, why in list(self._wrong.items()))

    def _ask(self, name: str) -> None:
        logged_at = float("-inf")
        while not self._is_over:
            try:
                self._calls[name]()
                del self._away[name]
                return
            except Exception as error:
                found = cure(error)
                if found:
                    self._wrong[name] = found
                    return
                self._away[name] = str(error) or type(error).__name__
            if time.monotonic() - logged_at > LOG_INTERVAL_S:
                logged_at = time.monotonic()
                logger.error("%s does not answer (%s): the worker waits for it.", name, self._away[name])
            time.sleep(RETRY_S)


def redis_pings(app: Celery) -> dict[str, Callable[[], Any]]:
    """A ping of each of an app's two servers, by the server's name. Thread-safe."""
    results = f"The results' Redis, IDEFICS_RESULT_BACKEND ({app.backend.as_uri().rpartition('+')[2]})"
    return {**broker_ping(app), results: lambda: app.backend.client.ping()}


def broker_ping(app: Celery) -> dict[str, Callable[[], Any]]:
    """A ping of an app's broker, by the server's name."""

    def ask_broker() -> None:
        with app.connection_for_write() as connection:
            # A channel's first command is PING.
            connection.connect()

    return {f"The queues' Redis, IDEFICS_BROKER_URL ({app.connection_for_write().as_uri()})": ask_broker}


class BrokerCheck(bootsteps.StartStopStep):  # type: ignore[misc]
    """For a worker that needs the broker only: its start waits for the broker, and fails if that cannot be used."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        """Raises WorkerShutdown."""
        check = RedisCheck(broker_ping(worker.app))
        check.start()
        try:
            while not check.have_answered:
                if check.wrong:
                    logger.critical("%s The worker stops.", check.wrong)
                    raise WorkerShutdown(EX_FAILURE)
                worker_state.maybe_shutdown()
                time.sleep(POLL_INTERVAL_S)
        finally:
            check.stop()
