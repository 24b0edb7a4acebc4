"""Finds the queue of a model, for `model=`, from what the workers register in Redis.

A producer names a model by its name, which is its queue's name without `idefics.`, or by its id. A model stays known
for a day (MODEL_TTL_S) after a worker last registered it, so that its jobs can wait in the queue while its only worker
restarts.
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

#: Maximum age in seconds of a cached reading: for a model that is in it; for a model that is not, or if Redis did not
#: answer.
CACHE_S, MISSING_CACHE_S = 10.0, 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What the workers had registered at one time, or why that could not be read."""

    #: Time of the reading, by time.monotonic().
    at: float
    #: The models whose workers are alive, in the order of their queues' names.
    served: list[ServedModel] = field(default_factory=list)
    #: The queue of each known model, by its name and by its id.
    queues: dict[str, str] = field(default_factory=dict)
    #: Why Redis could not be read; None if it was.
    error: Exception | None = None

    def holds(self, age_s: float) -> bool:
        """Whether it is younger than `age_s` seconds; a failed reading must be younger than MISSING_CACHE_S too."""
        return time.monotonic() - self.at < (min(age_s, MISSING_CACHE_S) if self.error else age_s)


class ModelDirectory:
    """The models of an app's workers, read from Redis and cached. Thread-safe."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._reading = Reading(float("-inf"))

    def queue_of(self, model: str) -> str:
        """The queue of the model with this name or id. Raises ModelNotFound, and the errors of `served`."""
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
        """A reading younger than `age_s` seconds. Threads that wait for it share it, since each reading may take
        seconds.

        Raises BrokerUnavailable or BrokerRefused.
        """
        with self._lock:
            if not self._reading.holds(age_s):
                self._reading = read_models(self._app)
            reading = self._reading
        if reading.error:
            raise from_broker(reading.error) from reading.error
        return reading


def read_models(app: Celery) -> Reading:
    """Read what the workers have registered, from Redis. Raises ConfigurationError if the broker is not Redis."""
    try:
        with registry(app) as redis:
            now, _ = redis.time()
            entries = redis.zrange(models_key(app), 0, -1, withscores=True)
    except (OperationalError, RedisError) as error:
        return Reading(time.monotonic(), error=error)
    known = known_models(entries, now)
    served = [model for is_silent, model in known if not is_silent]
    return Reading(time.monotonic(), served, queues(model for _, model in known))


def known_models(entries: Iterable[tuple[bytes, float]], now: float) -> list[tuple[bool, ServedModel]]:
    """The models in the workers' register, each with whether its workers are silent, those of live workers first."""
    known = [(registered_at < now - SILENT_S, ServedModel.read(text)) for text, registered_at in entries]
    return sorted(known, key=lambda each: (each[0], each[1].queue, each[1].id))


def queues(models: Iterable[ServedModel]) -> dict[str, str]:
    """The queue of each name and each id. A name wins over an equal id, and the first of several models with one id."""
    names: dict[str, str] = {}
    ids: dict[str, str] = {}
    for model in models:
        ids.setdefault(model.id, model.queue)
        if model.name:
            names[model.name] = model.queue
    return ids | names
