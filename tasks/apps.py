"""The Celery apps that the client uses. They give up within seconds if Redis does not answer."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from celery import Celery
from celery.app.defaults import DEFAULTS
from kombu import Producer, exceptions
from kombu.utils import symbol_by_name
from redis.exceptions import TimeoutError as RedisTimeoutError

from .availability import without_command
from .redis_urls import SCHEMES, Server, result_server, results_beside, server

#: Seconds without an answer after which a connection is given up: a frozen server does not close it.
SOCKET_TIMEOUT_S, CONNECT_TIMEOUT_S = 10.0, 5.0
DEFAULT_BROKER = "redis://localhost:6379/0"
#: A server without its scheme: a dot or a port tells it from the name of a result backend.
_PLACE = re.compile(r"(localhost|(?=[^/]*[.:])[\w.-]+(?::\d+)?)(/\d+)?/?")
_WEB = ("http", "https")

#: Retries of a call to the broker, and the pauses between them: two seconds in all.
RETRIES = {"max_retries": 5, "interval_start": 0, "interval_step": 0.2, "interval_max": 1}


class _App(Celery):  # type: ignore[misc]
    """Does not subscribe to each job's result when it sends the job: these messages would never be read.

    `AsyncResult.get` subscribes itself.
    """

    def _get_backend(self) -> Any:
        backend = super()._get_backend()
        backend.on_task_call = _subscribe_to_nothing
        return backend


def _subscribe_to_nothing(producer: Any, task_id: str) -> None:
    """Replaces Celery's `on_task_call`."""


class _Producer(Producer):  # type: ignore[misc]
    """Gives up after a few attempts, also with broadcasts to all workers, which Celery retries for ever."""

    def publish(self, *args: Any, retry_policy: dict[str, Any] | None = None, **options: Any) -> Any:
        policy = {"errback": _raise_silence, **(retry_policy or RETRIES)}
        return super().publish(*args, retry_policy=policy, **options)

    def publish_together(self, messages: Sequence[tuple[Any, dict[str, Any]]]) -> None:
        """Publish messages, each a body and the options of `publish`, in one round trip: see `_batch`.

        If the connection breaks, all are published again. Raises kombu's OperationalError.
        """
        self.connection.ensure(self, self._publish_once, errback=_raise_silence, **RETRIES)(messages)

    def _publish_once(self, messages: Sequence[tuple[Any, dict[str, Any]]]) -> None:
        # Kombu copies each entity that it is to declare, which costs more than sending a message.
        declared: set[int] = set()
        with _batch(self):
            for body, options in messages:
                new = [entity for entity in options.get("declare") or () if id(entity) not in declared]
                self.publish(body, **{**options, "declare": new, "retry": False})
                declared.update(map(id, new))


@contextlib.contextmanager
def _batch(producer: Producer) -> Iterator[None]:
    """Send what is published within the block to Redis in one round trip. Kombu before 5.7, and other brokers, take
    each message at once."""
    if not hasattr(producer, "batch"):
        yield
        return
    try:
        with producer.batch():
            yield
    except exceptions.BatchPublishError as error:
        raise without_command(error.__cause__ or error) from None


def _raise_silence(error: Exception, interval: float) -> None:
    """Raise, instead of retrying after a timeout: then the server is frozen or cut off."""
    if isinstance(error, TimeoutError | RedisTimeoutError):
        raise error


class _Amqp:
    """Mixed into an app's `amqp_cls`."""

    @property
    def producer_pool(self) -> Any:
        pool = super().producer_pool  # type: ignore[misc]
        pool.Producer = _Producer
        return pool


def _new_app(name: str | None, amqp: Any = Celery.amqp_cls, **options: Any) -> Celery:
    giving_up = type("_GivingUp", (_Amqp, symbol_by_name(amqp)), {})
    # It must not become the process's current app.
    return _App(name, amqp=giving_up, set_as_current=False, **options)


def app_at(broker_url: str | None, result_backend: str | None) -> Celery:
    """An app for a broker's URL, by default the environment's. Raises ValueError for one that Celery would misread."""
    broker_url, of_environment = (
        (broker_url, False) if broker_url else (_environment("BROKER_URL", DEFAULT_BROKER), True)
    )
    backend_url = result_backend or (_environment("RESULT_BACKEND") if of_environment else "")
    broker = _server(broker_url, server)
    results = _server(backend_url or _results_beside(broker_url), result_server)
    app = _new_app("idefics_jobs", broker=broker.url, backend=results.url)
    # Before CELERY_BROKER_URL and CELERY_RESULT_BACKEND, which a site's own Celery may have in the environment.
    app.backend_cls = results.url
    app.conf.update(
        broker_read_url=broker.url,
        broker_write_url=broker.url,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_publish_retry_policy=RETRIES,
        broker_transport_options={
            # The worker's steps: with other ones some priorities would go to lists that no worker reads.
            "priority_steps": [int(step) for step in _environment("PRIORITY_STEPS", "0,1,2,3,4,5,6,7,8,9").split(",")],
            **_named(sep=_environment("PRIORITY_SEPARATOR"), global_keyprefix=_environment("BROKER_KEY_PREFIX")),
            "queue_order_strategy": "priority",
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            # Of connecting.
            **RETRIES,
            **broker.keepalive,
            **broker.options,
        },
        result_backend_transport_options={
            **results.options,
            **_named(global_keyprefix=_environment("RESULT_KEY_PREFIX")),
        },
        redis_socket_timeout=SOCKET_TIMEOUT_S,
        redis_socket_connect_timeout=CONNECT_TIMEOUT_S,
        redis_socket_keepalive=bool(results.keepalive),
    )
    return app


def app_beside(app: Celery) -> Celery:
    """A copy of an app's settings with separate connections, which give up in time. The same copy for each call.

    The app itself is not changed, since its other uses may need other timeouts.
    """
    return app if isinstance(app, _App) else _beside.get(app) or _beside.setdefault(app, _new_app_beside(app))


_beside: weakref.WeakKeyDictionary[Celery, Celery] = weakref.WeakKeyDictionary()


def _new_app_beside(app: Celery) -> Celery:
    beside = _new_app(app.main, amqp=app.amqp_cls)
    beside.backend_cls = app.backend_cls
    # Copied at the first use: the app may be configured after the client is made.
    beside.add_defaults(lambda: _settings_beside(app))
    return beside


def _settings_beside(app: Celery) -> dict[str, Any]:
    conf = app.conf
    settings = {name: conf[name] for name, default in DEFAULTS.items() if conf[name] != default}
    timeouts = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    return {
        **{f"redis_{name}": seconds for name, seconds in timeouts.items()},
        **settings,
        "broker_url": conf.broker_url,
        "result_backend": conf.result_backend,
        # Other transports refuse unknown options.
        "broker_transport_options": {
            **(timeouts if app.connection_for_write().transport.driver_type == "redis" else {}),
            **(conf.broker_transport_options or {}),
            **RETRIES,
        },
        "task_publish_retry_policy": RETRIES,
    }


def reach(connection: Any) -> None:
    """Raises kombu's OperationalError if the broker cannot be reached within seconds."""
    connection.ensure_connection(**RETRIES, timeout=CONNECT_TIMEOUT_S)


def _named(**options: str) -> dict[str, str]:
    """The options that are not empty: kombu would use an empty one."""
    return {name: value for name, value in options.items() if value}


def _environment(name: str, default: str = "") -> str:
    """One of the worker's settings, if it is in this process's environment. An empty one counts as unset."""
    return os.environ.get(f"IDEFICS_{name}") or default


def _server(url: str, read: Callable[[str, str, str], Server]) -> Server:
    """What Celery gets for a URL; the URL itself for another broker than Redis.

    Raises ValueError for a misspelt Redis URL.
    """
    scheme, has_scheme, _ = url.partition("://")
    if scheme not in SCHEMES:
        if not has_scheme and (place := _PLACE.fullmatch(url)):
            raise ValueError(f"Write redis://{place[1]}{place[2] or '/0'}.")
        if scheme.lower() in _WEB:
            raise ValueError(f"{scheme}:// is not a Redis URL: write redis://host:6379/0.")
        return Server(url)
    return read(url, _environment("SENTINEL_MASTER"), _environment("SENTINEL_PASSWORD"))


def _results_beside(broker_url: str) -> str:
    try:
        return results_beside(broker_url)
    except ValueError as error:
        raise ValueError(f"Give result_backend too: {error}.") from None
