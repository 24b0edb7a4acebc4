"""Compares an app's options with its workers', so that a client can say why its jobs would not be answered.

Workers register their options in Redis (`tasks/worker_registry.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.backends.redis import RedisBackend
from celery.backends.rpc import RPCBackend
from kombu.exceptions import OperationalError
from redis import Redis, RedisError

from .errors import ConfigurationError
from .redis_keys import RESULTS_FINGERPRINT, WORKER_OPTIONS, broker_prefix, results_prefix, separator, steps
from .worker_registry import RENEW_S, SILENT_S, WorkerOptions, no_worker, workers_key

#: Seconds for which the fingerprint must differ before a client concludes that results are elsewhere. A Redis that was
#: emptied has the fingerprint again by then.
CONFIRM_S = 2 * RENEW_S
#: Seconds for which a client caches the workers' options.
CACHE_S = 10.0


def unseen(app: Celery, options: WorkerOptions) -> str | None:
    """Why workers with these options would not see an app's jobs, and what to do; None if they would see them."""
    prefix, own_steps = broker_prefix(app), set(steps(app))
    if prefix != options.prefix:
        return (
            f"This app's queues have the key prefix {prefix!r}, and the workers read {options.prefix!r}: correct "
            "global_keyprefix in broker_transport_options, or set IDEFICS_BROKER_KEY_PREFIX for the workers."
        )
    if separator(app) not in options.separators:
        return (
            f"This app's lists have the separator {separator(app)!r}, and the workers read "
            f"{', '.join(map(repr, options.separators))}: correct sep in broker_transport_options, or set "
            "IDEFICS_PRIORITY_SEPARATOR for the workers."
        )
    if not own_steps <= set(options.steps):
        return (
            f"This app's priority_steps {sorted(own_steps)} are not among those that the workers read, "
            f"{list(options.steps)}: correct priority_steps in broker_transport_options, or set "
            "IDEFICS_PRIORITY_STEPS for the workers."
        )
    return None


def unreadable(backend: Any) -> str | None:
    """Why answers cannot be read from a result backend, and what to do; None if they can."""
    if isinstance(backend, DisabledBackend):
        return (
            "This app has no result backend, so no answer can be read: set result_backend to the workers' "
            "IDEFICS_RESULT_BACKEND, as redis://host:6379/1."
        )
    if isinstance(backend, RPCBackend):
        return (
            "This app waits for answers at rpc://, where the workers send none: set result_backend to their "
            "IDEFICS_RESULT_BACKEND, as redis://host:6379/1."
        )
    return None


class SetupCheck:
    """Compares an app's options with its workers'. Thread-safe."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._options: WorkerOptions | None = None
        #: Since when the app's result backend has differed from the workers', by time.monotonic(); None if it does not.
        self._elsewhere_since: float | None = None

    def check_sending(self) -> None:
        """Raise ConfigurationError if the workers would not see this app's jobs."""
        options = self._known()
        wrong = unseen(self._app, options) if options else None
        if wrong is not None:
            raise ConfigurationError(wrong)

    def check_reading(self) -> None:
        """Raise ConfigurationError if answers cannot be read: there is no such backend, or for CONFIRM_S the workers
        have written answers elsewhere."""
        if disabled := unreadable(self._app.backend):
            raise ConfigurationError(disabled)
        options = self._known()
        wrong = self._elsewhere(options) if options else None
        if wrong is None:
            self._elsewhere_since = None
            return
        since = self._elsewhere_since = self._elsewhere_since or time.monotonic()
        if time.monotonic() - since > CONFIRM_S:
            raise ConfigurationError(wrong)

    def workers(self, queue: str) -> list[str]:
        """Names of the workers that are registered for a queue.

        Raises RedisError or OperationalError, and ConfigurationError if the broker is not Redis.
        """
        with registry(self._app) as redis:
            now, _ = redis.time()
            entered = redis.zrange(workers_key(self._app, queue), 0, -1, withscores=True)
        return sorted(_text(name) for name, registered_at in entered if registered_at >= now - SILENT_S)

    def why_no_answer(self, queue: str | None) -> str:
        """Why a job has no answer yet, as a sentence for its producer. `queue`: the job's queue, if it is known."""
        try:
            with self._app.connection_for_write() as connection:
                _reach(connection)
        except OperationalError as error:
            return f"The broker cannot be reached ({error}): is it up, and its URL right?"
        with self._lock:
            self._read_at = float("-inf")
        options = self._known()
        wrong = (unseen(self._app, options) or self._elsewhere(options)) if options else None
        return wrong or self._who_works(queue)

    def _who_works(self, queue: str | None) -> str:
        """How many workers take from a queue, as a sentence."""
        try:
            count = len(self.workers(queue)) if queue else None
        except (RedisError, OperationalError, ConfigurationError):
            # This Redis user may not ask, or the broker is not Redis.
            count = None
        if count is None or queue is None:
            return "Is a worker running on its queue?"
        if not count:
            return no_worker(queue)
        who = "1 worker takes" if count == 1 else f"{count} workers take"
        return f"{who} from its queue: it waits for its turn, or runs."

    def _known(self) -> WorkerOptions | None:
        """The workers' options, cached for CACHE_S; None if none are registered, or the broker does not answer or is
        not Redis."""
        with self._lock:
            if time.monotonic() - self._read_at >= CACHE_S:
                self._options = self._read()
                self._read_at = time.monotonic()
            return self._options

    def _read(self) -> WorkerOptions | None:
        try:
            with registry(self._app) as redis:
                found = redis.get(WORKER_OPTIONS.named())
            return WorkerOptions.read(found) if found else None
        except (RedisError, OperationalError, OSError, ValueError, TypeError, KeyError):
            # The broker is away or not Redis, this Redis user may not ask, or the workers have another version.
            return None

    def _elsewhere(self, options: WorkerOptions) -> str | None:
        """Why the app would look for results elsewhere than the workers write them, and what to do; None if it would
        not, or that is not known."""
        backend = self._app.backend
        if not isinstance(backend, RedisBackend):
            return None
        try:
            said = backend.client.get(RESULTS_FINGERPRINT.named())
        except RedisError:
            return None
        if said is None or _text(said) != options.results:
            return _other_place(self._app)
        if results_prefix(self._app) != options.results_prefix:
            return (
                f"This app reads answers under the key prefix {results_prefix(self._app)!r}, and the workers write "
                f"under {options.results_prefix!r}: correct global_keyprefix in result_backend_transport_options, or "
                "set IDEFICS_RESULT_KEY_PREFIX for the workers."
            )
        return None


@contextlib.contextmanager
def registry(app: Celery) -> Iterator[Any]:
    """A client of the Redis in which an app's workers register.

    Raises OperationalError if it cannot be reached, and ConfigurationError if the broker is not Redis.
    """
    with app.connection_for_write() as connection:
        if connection.transport.driver_type != "redis":
            raise ConfigurationError(
                "Workers announce themselves in Redis only: on another broker, ask them with "
                "Celery's app.control.inspect().active_queues()."
            )
        _reach(connection)
        yield Redis(connection_pool=connection.default_channel.pool)


def _reach(connection: Any) -> None:
    """Raise OperationalError if the broker cannot be reached within 5 seconds."""
    connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)


def _other_place(app: Celery) -> str:
    """The message for an app whose results are in another place than the workers'."""
    cure = "set result_backend to the workers' IDEFICS_RESULT_BACKEND."
    if _is_same_database(app):
        return (
            "This app looks for answers in the queues' own database, and the workers write them to another one "
            f"(by default the next): {cure}"
        )
    return f"This app looks for answers in {app.backend.as_uri()}, and the workers write them elsewhere: {cure}"


_checks: weakref.WeakKeyDictionary[Celery, SetupCheck] = weakref.WeakKeyDictionary()


def setup_check_of(app: Celery) -> SetupCheck:
    """The app's SetupCheck, the same one at each call."""
    return _checks.setdefault(app, SetupCheck(app))


def _is_same_database(app: Celery) -> bool:
    """Whether the app's queues and results are in one database of one server."""
    broker, results = app.connection_for_write(), getattr(app.backend, "connparams", {})
    database = str(broker.virtual_host or "0").strip("/") or "0"
    ours = broker.hostname, broker.port or 6379, database
    return ours == (results.get("host"), results.get("port"), str(results.get("db")))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
