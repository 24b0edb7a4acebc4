"""Which models the workers serve, and from which queues: how `model=` finds the queue that a job goes to.

A model is asked for by its name, which is its queue's without `idefics.`, or by its id. It stays known for a day
(MODEL_TTL_S) after a worker last said that it serves it: while a model's only worker restarts, its jobs wait in the
queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from celery import Celery
from kombu.exceptions import OperationalError
from redis import RedisError

from .errors import ModelNotFound, from_broker
from .setup_check import registry
from .worker_registry import SILENT_S, ServedModel, models_key

#: Seconds for which a reading holds: for a model that is in it; for one that is not, and where Redis did not answer.
CACHE_S, MISSING_CACHE_S = 10.0, 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What workers had said at a time."""

    #: time.monotonic()
    at: float
    #: The models whose workers are alive, by their queues' names.
    served: list[ServedModel] = field(default_factory=list)
    #: By name and by id: the queue of each model that is known.
    queues: dict[str, str] = field(default_factory=dict)
    #: Why it could not be read.
    error: Exception | None = None

    def holds(self, age_s: float) -> bool:
        """Whether it is young enough."""
        return time.monotonic() - self.at < (min(age_s, MISSING_CACHE_S) if self.error else age_s)


class ModelDirectory:
    """The models of an app's workers, read from Redis at times. Safe to share between threads."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._reading = Reading(float("-inf"))

    def queue_of(self, model: str) -> str:
        """The queue of the model with this name or id. Raises ModelNotFound, and what `served` does."""
        for age_s in (CACHE_S, MISSING_CACHE_S):
            reading = self._read(age_s)
            if queue := reading.queues.get(model):
                return queue
        raise ModelNotFound(model, reading.served)

    def served(self) -> list[ServedModel]:
        """The models whose workers are alive.

        Raises BrokerUnavailable or BrokerRefused, and ConfigurationError if the broker is not Redis.
        """
        return list(self._read(0.0).served)

    def _read(self, age_s: float) -> Reading:
        """A reading that is not older. Threads that wait for one have it too: another one may take seconds again."""
        with self._lock:
            if not self._reading.holds(age_s):
                self._reading = read_models(self._app)
            reading = self._reading
        if reading.error:
            raise from_broker(reading.error) from reading.error
        return reading


def read_models(app: Celery) -> Reading:
    """What the workers have said until now."""
    try:
        with registry(app) as redis:
            now, _ = redis.time()
            said = redis.zrange(models_key(app), 0, -1, withscores=True)
    except (OperationalError, RedisError) as error:
        return Reading(time.monotonic(), error=error)
    known = [(said_at < now - SILENT_S, ServedModel.read(text)) for text, said_at in said]
    known.sort(key=lambda each: (each[0], each[1].queue, each[1].id))
    served = [model for is_silent, model in known if not is_silent]
    return Reading(time.monotonic(), served, queues(model for _, model in known))


def queues(models: Iterable[ServedModel]) -> dict[str, str]:
    """The queue by each name and each id. A name comes before an id; of several models with one id the first counts."""
    names: dict[str, str] = {}
    ids: dict[str, str] = {}
    for model in models:
        ids.setdefault(model.id, model.queue)
        if model.name:
            names[model.name] = model.queue
    return ids | names
