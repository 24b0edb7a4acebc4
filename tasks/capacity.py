"""Whether the broker has room for another job. Jobs are refused before it is full, so that workers can still work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.exceptions import ChannelError, OperationalError
from redis.exceptions import NoPermissionError

from .apps import reach
from .errors import QueueFull
from .redis_keys import GUIDES_SEPARATOR, SEPARATOR, list_name

#: Seconds between two measurements of the broker.
MEASURE_INTERVAL_S = 1.0
#: Seconds for which the connection that measures is kept: connecting costs more than measuring, but one that was idle
#: for long may be half open.
KEEP_S = 10.0
#: Celery's priorities; each has its own list in Redis.
PRIORITIES = range(10)


@dataclass(slots=True)
class Measurement:
    """The broker's jobs and memory at one time, and the jobs queued by this process since."""

    at: float
    queued: int = 0
    #: Used share of its maxmemory.
    memory: float = 0.0
    #: Why it could not be measured.
    away: Exception | None = None


class Capacity:
    """Safe to share between threads."""

    def __init__(self, app: Celery, max_queued: int | None, max_memory: float | None) -> None:
        self._app = app
        self._max_queued = max_queued
        self._max_memory = max_memory
        self._measurements: dict[str, Measurement] = {}
        self._lock = threading.Lock()
        self._connection: Any = None
        self._connected_until = 0.0

    def take(self, queue: str) -> None:
        """Count a job that is about to be queued.

        Raises QueueFull if there is no room for it, and OperationalError if the broker is away.
        """
        if self._max_queued is None and self._max_memory is None:
            return
        with self._lock:
            measured = self._measurements.get(queue)
            if measured is None or time.monotonic() - measured.at >= MEASURE_INTERVAL_S:
                measured = self._measurements[queue] = self._measure(queue)
            if measured.away is not None:
                # Also for the threads that waited for this measurement: another one may take seconds again.
                raise OperationalError(str(measured.away)) from measured.away
            if self._max_queued is not None and measured.queued >= self._max_queued:
                raise QueueFull(
                    f"{measured.queued} jobs wait in {queue}, and the client's max_queued is {self._max_queued}: "
                    "submit it later, or add workers."
                )
            if self._max_memory is not None and measured.memory > self._max_memory:
                raise QueueFull(
                    f"The broker has used {measured.memory:.0%} of its memory, and the client's max_memory is "
                    f"{self._max_memory:.0%}: submit it later, add workers, or raise the server's maxmemory."
                )
            measured.queued += 1

    def queued(self, queue: str, priority: int | None = None) -> int:
        """The number of waiting jobs, all or (on Redis) of one priority. Raises OperationalError if Redis is away."""
        with self._app.connection_for_write() as connection:
            reach(connection)
            try:
                return _queued(connection, queue, PRIORITIES if priority is None else [priority])
            except ChannelError:
                # The queue does not exist yet.
                return 0
            except connection.connection_errors as error:
                raise OperationalError(str(error)) from error

    def _measure(self, queue: str) -> Measurement:
        connection = self._connect()
        try:
            reach(connection)
            return Measurement(time.monotonic(), _queued(connection, queue, PRIORITIES), self._memory(connection))
        except (OperationalError, *connection.connection_errors) as error:
            self._disconnect()
            return Measurement(time.monotonic(), away=error)
        except (ChannelError, *connection.channel_errors):
            # The queue does not exist yet, or this user may not measure: submitting reports the error.
            self._disconnect()
            return Measurement(time.monotonic())

    def _connect(self) -> Any:
        """The kept connection, or a new one that will be kept."""
        now = time.monotonic()
        if now > self._connected_until:
            self._disconnect()
        self._connected_until = now + KEEP_S
        self._connection = self._connection or self._app.connection_for_write()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    def _memory(self, connection: Any) -> float:
        if self._max_memory is None or connection.transport.driver_type != "redis":
            return 0.0
        try:
            with connection.default_channel.conn_or_acquire() as client:
                memory = client.info("memory")
        except NoPermissionError:
            self._max_memory = None
            return 0.0
        limit = memory.get("maxmemory") or 0
        return memory["used_memory"] / limit if limit else 0.0


def _queued(connection: Any, queue: str, priorities: Iterable[int]) -> int:
    """Counts all priorities, also those that the app itself does not send."""
    channel = connection.default_channel
    if connection.transport.driver_type != "redis":
        return int(channel.queue_declare(queue, passive=True).message_count)
    own, others = _lists(queue, priorities, channel)
    with channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
        for name in own + others:
            pipe.llen(name)
        found = pipe.execute(raise_on_error=False)
    for error in found[: len(own)]:
        if isinstance(error, Exception):
            raise error
    # The user may have rights to kombu's lists only.
    return sum(length for length in found if not isinstance(length, Exception))


def _lists(queue: str, priorities: Iterable[int], channel: Any) -> tuple[list[str], list[str]]:
    """The lists that this app sends to, and the lists of producers with another separator."""
    steps = list(priorities)
    own = [list_name(queue, step, channel.sep) for step in steps]
    separators = [sep for sep in (SEPARATOR, GUIDES_SEPARATOR) if sep != channel.sep]
    return own, [list_name(queue, step, sep) for step in steps if step for sep in separators]
