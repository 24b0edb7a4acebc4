"""Celery's configuration, made from our settings, for both kinds of workers."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from kombu import Exchange, Queue

from config.settings import PREFIX, Settings

#: Seconds for a connection to be made: a host that drops all packets is given up then.
CONNECT_TIMEOUT_S = 5.0
#: Celery's environment variables, and the setting of ours that each of them would override.
_OVERRIDES = {
    "CELERY_BROKER_URL": "BROKER_URL",
    "CELERY_BROKER_READ_URL": "BROKER_URL",
    "CELERY_BROKER_WRITE_URL": "BROKER_URL",
    "CELERY_RESULT_BACKEND": "RESULT_BACKEND",
}
#: Connections that publish at the same time.
BROKER_POOL = 4


def configuration(settings: Settings, queue: str, default_priority: int, tasks: Iterable[str] = ()) -> dict[str, Any]:
    """Celery's settings for a worker of `queue`, to which its own `tasks` are sent."""
    sweep_s = max(1, min(10, settings.visibility_timeout_s // 4))
    broker, results = settings.broker, settings.results
    return {
        "broker_url": broker.url,
        "result_backend": _first_terminal_state_wins(results.url),
        # JSON only: unpickling a message would run its code.
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        # The worker's queue unless -Q names another one; declared as a producer's Celery does.
        "task_queues": [Queue(queue, Exchange(queue, type="direct"), routing_key=queue)],
        "task_routes": {name: {"queue": queue} for name in tasks},
        # For links, errbacks, chains and chords' bodies: tasks of the producers, run by the workers of their own apps.
        "task_default_queue": settings.default_queue,
        "task_create_missing_queues": True,
        "task_default_priority": default_priority,
        # A message is acknowledged after its result is stored, not when a worker receives it.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # Our result backend does this, by the job's task and arguments and not by its id alone.
        "worker_deduplicate_successful_tasks": False,
        "task_time_limit": settings.time_limit_s,
        "task_soft_time_limit": settings.soft_time_limit_s,
        "worker_pool": "worker.pool:InferencePool",
        "worker_consumer": "worker.queue.consumer:Consumer",
        # One model process; the pool itself holds `job_threads` jobs.
        "worker_concurrency": 1,
        "worker_prefetch_multiplier": settings.job_threads,
        # With IDEFICS_ATOMIC_RESERVE=false jobs with a countdown wait in the worker's memory: they must neither block
        # the others nor be unbounded. Otherwise they wait in Redis (worker/queue/due.py).
        "worker_eta_task_limit": settings.job_threads + 10_000,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": settings.soft_shutdown_timeout_s,
        "worker_enable_soft_shutdown_on_idle": False,
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
        "broker_connection_retry_on_startup": True,
        # If a full server or a full disk refuses a command, connect again; without this the worker would exit.
        "broker_channel_error_retry": True,
        # All job threads share these; each is one or two connections.
        "broker_pool_limit": BROKER_POOL,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout_s,
            "queue_order_strategy": "priority",
            "priority_steps": list(settings.priority_steps),
            **_named(sep=settings.priority_separator, global_keyprefix=settings.broker_key_prefix),
            "socket_timeout": 30,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            **broker.keepalive,
            **broker.options,
            "health_check_interval": 25,
            # Seconds between two sweeps for jobs whose visibility timeout is over.
            "unacked_restore_interval": sweep_s,
            "unacked_restore_throttle": 1,
            # Seconds after which the sweep's lock expires, if a worker died or was cut off while it held it.
            "unacked_mutex_expire": sweep_s,
        },
        "result_backend_transport_options": {
            "socket_timeout": 30,
            **results.options,
            **_named(global_keyprefix=settings.result_key_prefix),
            # Job threads wait in their own Redis client (worker/queue/redis_retry.py); the event loop must not wait.
            "retry_policy": {"max_retries": 0},
        },
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": CONNECT_TIMEOUT_S,
        "redis_socket_keepalive": bool(results.keepalive),
        "redis_backend_health_check_interval": 25,
        # Many job threads store results at the same time.
        "result_backend_thread_safe": True,
        "result_expires": settings.result_ttl_s,
        "result_extended": True,
    }


def drop_overrides(environment: MutableMapping[str, str], settings: Settings) -> str | None:
    """Remove variables from the environment that would override our settings, if they have the same value.

    Celery's command line sets CELERY_BROKER_URL from BROKER_URL and -b, and CELERY_RESULT_BACKEND from RESULT_BACKEND:
    variables that a site's own Celery often has. Returns what to correct if one has another value, else None.
    """
    ours = {"BROKER_URL": settings.broker_url, "RESULT_BACKEND": settings.result_backend}
    for name, value in environment.items():
        kind = _OVERRIDES.get(name)
        if kind and value != ours[kind].get_secret_value():
            return (
                f"{name} is set to another server than {PREFIX}{kind}: a worker of this project uses "
                f"{PREFIX}{kind} only. Set that one, and start without {kind}, {name} and -b."
            )
    for name in _OVERRIDES:
        environment.pop(name, None)
    return None


def _first_terminal_state_wins(url: str) -> str:
    """The URL of our own backend (worker/queue/result_backend.py) on the same Redis. Producers use Celery's."""
    if url.startswith("sentinel://"):
        return f"worker.queue.result_backend:SentinelResultBackend+{url}"
    # kombu calls a socket redis+socket://, Celery's backend socket://.
    return f"worker.queue.result_backend:ResultBackend+{url.removeprefix('redis+')}"


def _named(**options: str) -> dict[str, str]:
    """The options that are not empty: kombu would use an empty one."""
    return {name: value for name, value in options.items() if value}
