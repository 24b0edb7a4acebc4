"""What workers register about themselves in Redis: their options, their queues and their model.

Workers renew these keys while they live:

- `idefics:worker:options` in the queues' database: the options by which workers read messages, and a fingerprint of the
  results' address. `idefics:worker:results` in the results' database: the same fingerprint. Neither key has a prefix,
  since a client may have the wrong one. Clients compare both with their own options (`tasks/setup_check.py`).
- A key for each queue, under the app's prefix: the workers that take jobs from it.
- A key for each worker, under the app's prefix: its state and recent work (`tasks/worker_status.py`).
- A key for all models, under the app's prefix: which model is served from which queue (`tasks/model_directory.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from celery import Celery
from redis import Redis

from .protocol import QUEUE
from .redis_keys import (
    GUIDES_SEPARATOR,
    MODELS,
    RESULTS_FINGERPRINT,
    SEPARATOR,
    WORKER_OPTIONS,
    WORKER_STATUS,
    WORKERS,
    broker_prefix,
    results_prefix,
    separator,
    steps,
)
from .worker_status import WorkerStatus

#: Seconds between two renewals, and seconds for which the keys live without one.
RENEW_S = 5.0
TTL_S = 30
#: Seconds without a renewal after which a worker counts as gone. A worker that shuts down in order deregisters.
SILENT_S = 3 * RENEW_S
#: Seconds for which a model stays known after its last worker, which may be restarting while jobs wait.
MODEL_TTL_S = 86_400


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options by which workers read messages and write results."""

    separators: tuple[str, ...]
    steps: tuple[int, ...]
    prefix: str
    results_prefix: str
    #: Fingerprint of the results' address.
    results: str

    @staticmethod
    def of(app: Celery) -> WorkerOptions:
        """The options of a worker's app."""
        separators = tuple(dict.fromkeys((separator(app), SEPARATOR, GUIDES_SEPARATOR)))
        place = hashlib.sha256(str(app.conf.result_backend).encode()).hexdigest()[:16]
        return WorkerOptions(separators, steps(app), broker_prefix(app), results_prefix(app), place)

    def written(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: bytes | str) -> WorkerOptions:
        said = json.loads(text)
        return WorkerOptions(**{**said, "separators": tuple(said["separators"]), "steps": tuple(said["steps"])})


#: The beginning of a named model's queue.
NAMED = f"{QUEUE}."


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that workers serve from a queue."""

    #: The workers' IDEFICS_MODEL; in results `model.id`.
    id: str
    #: The queue that its workers take jobs from: their IDEFICS_QUEUE.
    queue: str

    @property
    def name(self) -> str | None:
        """The queue's name without `idefics.`; None for another queue, such as `idefics`, the queue of jobs that name
        no model."""
        return self.queue.removeprefix(NAMED) if self.queue.startswith(NAMED) else None

    def __str__(self) -> str:
        return f"{self.name} ({self.id})" if self.name and self.name != self.id else self.id

    def written(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: bytes | str) -> ServedModel:
        said = json.loads(text)
        return ServedModel(said["id"], said["queue"])


def publish(app: Celery, options: WorkerOptions, broker: Redis) -> None:
    """Renew the keys of the workers' options. Raises RedisError."""
    app.backend.client.set(RESULTS_FINGERPRINT.named(), options.results, ex=TTL_S)
    broker.set(WORKER_OPTIONS.named(), options.written(), ex=TTL_S)


def register(app: Celery, worker: str, model: str, broker: Redis, status: WorkerStatus | None = None) -> None:
    """Enter a worker and its model for each of its queues. Raises RedisError."""
    now, _ = broker.time()
    models = models_key(app)
    with broker.pipeline() as pipe:
        for queue in app.amqp.queues.consume_from:
            key = workers_key(app, queue)
            pipe.zadd(key, {worker: now})
            pipe.zremrangebyscore(key, "-inf", now - TTL_S)
            pipe.expire(key, TTL_S)
            pipe.zadd(models, {ServedModel(model, queue).written(): now})
        if status is not None:
            pipe.set(status_key(app, worker), status.written(), ex=TTL_S)
        pipe.zremrangebyscore(models, "-inf", now - MODEL_TTL_S)
        pipe.expire(models, MODEL_TTL_S)
        pipe.execute()


def deregister(app: Celery, worker: str, broker: Redis) -> None:
    """Remove a worker from its queues: it takes no more jobs. Raises RedisError."""
    for queue in app.amqp.queues.consume_from:
        broker.zrem(workers_key(app, queue), worker)
    broker.delete(status_key(app, worker))


def workers_key(app: Celery, queue: str) -> str:
    return f"{broker_prefix(app)}{WORKERS.named(queue)}"


def status_key(app: Celery, worker: str) -> str:
    return f"{broker_prefix(app)}{WORKER_STATUS.named(worker)}"


def models_key(app: Celery) -> str:
    return f"{broker_prefix(app)}{MODELS.named()}"


def no_worker(queue: str) -> str:
    """The message for a queue whose jobs wait, since no worker takes from it."""
    return f"No worker takes from the queue {queue!r}: is one running? A worker takes jobs once its model has loaded."
