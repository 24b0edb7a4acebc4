"""Whether the broker has room for another job: jobs are refused before it is full, while its workers can still work."""

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

#: Seconds between two looks at the broker.
LOOK_S = 1.0
#: Celery's priorities; each but 0 has a list of its own in Redis.
PRIORITIES = range(10)


@dataclass(slots=True)
class Look:
    """What the broker held when it was looked at, and what was queued from here since."""

    at: float
    queued: int = 0
    #: The share of its maxmemory.
    memory: float = 0.0
    #: Why it could not be looked at.
    away: Exception | None = None


class Capacity:
    """Safe to share between threads."""

    def __init__(self, app: Celery, max_queued: int | None, max_memory: float | None) -> None:
        self._app = app
        self._max_queued = max_queued
        self._max_memory = max_memory
        self._looks: dict[str, Look] = {}
        self._lock = threading.Lock()

    def take(self, queue: str) -> None:
        """Count a job that is about to be queued.

        Raises QueueFull where there is no room for it, and OperationalError where the broker is away.
        """
        if self._max_queued is None and self._max_memory is None:
            return
        with self._lock:
            look = self._looks.get(queue)
            if look is None or time.monotonic() - look.at >= LOOK_S:
                look = self._looks[queue] = self._look(queue)
            if look.away is not None:
                # Those that waited for this look too: another one may take seconds again.
                raise OperationalError(str(look.away)) from look.away
            if self._max_queued is not None and look.queued >= self._max_queued:
                raise QueueFull(
                    f"{look.queued} jobs wait in {queue}, and the client's max_queued is {self._max_queued}: "
                    "submit it later, or add workers."
                )
            if self._max_memory is not None and look.memory > self._max_memory:
                raise QueueFull(
                    f"The broker has used {look.memory:.0%} of its memory, and the client's max_memory is "
                    f"{self._max_memory:.0%}: submit it later, add workers, or raise the server's maxmemory."
                )
            look.queued += 1

    def queued(self, queue: str, priority: int | None = None) -> int:
        """Jobs that wait, all or (on Redis) with one priority. Raises OperationalError where the broker is away."""
        with self._app.connection_for_write() as connection:
            reach(connection)
            try:
                return _queued(connection, queue, PRIORITIES if priority is None else [priority])
            except ChannelError:
                # No such queue yet.
                return 0
            except connection.connection_errors as error:
                raise OperationalError(str(error)) from error

    def _look(self, queue: str) -> Look:
        connection = self._app.connection_for_write()
        try:
            reach(connection)
            return Look(time.monotonic(), _queued(connection, queue, PRIORITIES), self._memory(connection))
        except (OperationalError, *connection.connection_errors) as error:
            return Look(time.monotonic(), away=error)
        except (ChannelError, *connection.channel_errors):
            # No such queue yet, or not for this user to ask: submitting tells.
            return Look(time.monotonic())
        finally:
            connection.release()

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
    """Whatever priorities the app itself sends."""
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
    # A user's rights may name kombu's lists alone.
    return sum(length for length in found if not isinstance(length, Exception))


def _lists(queue: str, priorities: Iterable[int], channel: Any) -> tuple[list[str], list[str]]:
    """The lists that this app sends to, and those of producers with another separator before a priority's number."""
    steps = list(priorities)
    own = [list_name(queue, step, channel.sep) for step in steps]
    separators = [sep for sep in (SEPARATOR, GUIDES_SEPARATOR) if sep != channel.sep]
    return own, [list_name(queue, step, sep) for step in steps if step for sep in separators]
