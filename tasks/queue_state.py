"""The states of queues, read from Redis in as few round trips for many jobs as for one.

A queue has a list for each priority, and two or three names for each of these lists (`tasks/redis_keys.py`). Tools that
read one list, such as Flower on the broker's URL alone, miss most jobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from time import time as clock
from typing import Any, cast

from celery import Celery
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from .model_directory import known_models
from .protocol import CANCEL_TTL_S
from .queue_lists import QueueLists
from .redis_keys import DUE, UNACKED, broker_prefix
from .setup_check import registry
from .worker_registry import SILENT_S, ServedModel, models_key, status_key, workers_key
from .worker_status import WorkerStatus

#: Queues and workers that are read at most.
MAX_QUEUES, MAX_WORKERS = 100, 1_000
#: Bytes at a message's end that hold its headers: kombu writes them behind the body, which may have megabytes.
TAIL_BYTES = 8_192
#: The end of the message that is taken next from a list. In Lua, so that no body leaves the server.
PEEK = f"""
local raw = redis.call('LINDEX', KEYS[1], -1)
return raw and string.sub(raw, -{TAIL_BYTES})
"""
# The header SUBMITTED_AT. Text within a JSON string cannot match: its quotes are escaped.
_SENT_AT = re.compile(rb'"idefics_submitted_at": ?(\d{1,12}(?:\.\d{1,9})?)[,}]')
_TAG = re.compile(rb'"delivery_tag": ?"([^"\\]{1,64})"')


@dataclass(frozen=True, slots=True)
class QueueState:
    """The current state of a queue. None: this Redis user may not know."""

    queue: str
    #: Jobs that are due and that no worker has taken yet.
    waiting: int
    #: The same by priority, 0 to 9.
    by_priority: dict[int, int]
    #: Jobs with a countdown or an eta that a worker has set aside until their time.
    due_later: int | None
    #: Jobs that workers hold, running or prefetched, of all queues of this Redis together.
    in_flight: int | None
    #: Names of the workers that take from the queue.
    workers: list[str] | None
    #: Ids of the models that they serve.
    models: list[str] | None
    #: Seconds since the oldest waiting job was sent. None also if no job waits, and at first if its message does not
    #: say when it was sent: then the age is counted from when a reader first saw it.
    oldest_age_s: float | None = None


class FirstSeen:
    """When the next message of each list was first seen, for messages that do not say when they were sent."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bytes, float]] = {}

    def age(self, name: str, tail: bytes | None, now: float) -> float | None:
        """Seconds since the next message of a list was sent, or was first seen; None at first sight.

        `tail`: the message's end, from PEEK. None if this user may not read it: then the age is that of the first sight
        of a message in this list.
        """
        sent_at = _sent_at(tail or b"", now)
        if sent_at is not None:
            self._seen.pop(name, None)
            return max(0.0, now - sent_at)
        tag = _TAG.search(tail or b"")
        message = tag[1] if tag else b""
        seen, first_at = self._seen.get(name, (b"", now))
        if seen != message or name not in self._seen:
            self._seen[name] = (message, now)
            return None
        return now - first_at

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Forget the lists that are empty now."""
        self._seen = {name: self._seen[name] for name in names if name in self._seen}


def _sent_at(tail: bytes, now: float) -> float | None:
    """The producer's time in a message, if it is one at which a job that waits now may have been sent."""
    found = _SENT_AT.search(tail)
    at = float(found[1]) if found else 0.0
    return at if now - CANCEL_TTL_S <= at <= now + CANCEL_TTL_S else None


@dataclass(frozen=True, slots=True)
class _BrokerReplies:
    """What Redis says about all queues. None: this user may not know."""

    #: Unix seconds of the server's clock.
    now: float
    in_flight: int | None
    #: With whether their workers are silent.
    models: list[tuple[bool, ServedModel]] | None


@dataclass(frozen=True, slots=True)
class _QueueReplies:
    """What Redis says about one queue. None: this user may not know."""

    #: By the name of each list, without the app's prefix.
    lengths: dict[str, int | None]
    due: list[int | None]
    workers: list[tuple[bytes, float]] | None


class QueueReader:
    """Reads the states of an app's queues. Used by one thread at a time."""

    def __init__(self, app: Celery, redis: Redis | None = None) -> None:
        """`redis`: a client of the app's broker. Default: one is opened, which raises OperationalError if it is away,
        and ConfigurationError if it is not Redis."""
        self._app = app
        self._redis: Any = redis or _connect(app)
        self._prefix = broker_prefix(app)
        self._lists = QueueLists(app)
        self._first_seen = FirstSeen()

    def read(self, *queues: str, with_known: bool = False) -> dict[str, QueueState]:
        """The states of some queues, and `with_known` of those of all models that this Redis knows.

        A queue that this user may not count is left out. Raises RedisError.
        """
        about = self._ask_about_all()
        known = [model.queue for _, model in about.models or () if with_known]
        replies = self._ask_about(list(dict.fromkeys([*queues, *known]))[:MAX_QUEUES])
        ages = self._ages(
            [name for each in replies.values() for name, count in each.lengths.items() if count], about.now
        )
        return {
            queue: self._state(queue, each, about, ages)
            for queue, each in replies.items()
            if each.lengths[queue] is not None
        }

    def statuses(self, workers: Iterable[str]) -> dict[str, WorkerStatus]:
        """What workers say about their work; those that say nothing, or may not be asked, are left out.

        Raises RedisError.
        """
        names = list(workers)[:MAX_WORKERS]
        texts = self._ask([("get", status_key(self._app, name)) for name in names])
        return {name: WorkerStatus.read(text) for name, text in zip(names, texts, strict=True) if text}

    def _ask_about_all(self) -> _BrokerReplies:
        models, unacked = models_key(self._app), f"{self._prefix}{UNACKED.named()}"
        time, entries, in_flight = self._ask([("time",), ("zrange", models, 0, -1, False, True), ("hlen", unacked)])
        now = time[0] + time[1] / 1e6 if time else clock()
        return _BrokerReplies(now, in_flight, None if entries is None else known_models(entries, now))

    def _ask_about(self, queues: list[str]) -> dict[str, _QueueReplies]:
        lists = {queue: list(self._lists.of(queue)) for queue in queues}
        commands: list[tuple[Any, ...]] = []
        for queue, names in lists.items():
            commands += [("llen", self._prefix + name) for name in names]
            commands += [("zcard", f"{self._prefix}{DUE.named(self._prefix + name)}") for name in names]
            commands.append(("zrange", workers_key(self._app, queue), 0, -1, False, True))
        replies = iter(self._ask(commands))
        return {
            queue: _QueueReplies({name: next(replies) for name in names}, [next(replies) for _ in names], next(replies))
            for queue, names in lists.items()
        }

    def _ages(self, names: list[str], now: float) -> dict[str, float | None]:
        """The ages of the next messages of lists that have some."""
        # One by one: Redis would serve nobody else during a pipeline of them, and 30 MB take it 25 ms. It has other
        # words for a command within a script that this user may not give, and some servers allow no script.
        tails = [self._ask([("eval", PEEK, 1, self._prefix + name)], ResponseError)[0] for name in names]
        self._first_seen.forget_all_but(names)
        return {name: self._first_seen.age(name, tail, now) for name, tail in zip(names, tails, strict=True)}

    def _state(
        self, queue: str, replies: _QueueReplies, about: _BrokerReplies, ages: dict[str, float | None]
    ) -> QueueState:
        by_priority = dict.fromkeys(self._lists.priorities, 0)
        for name, priority in self._lists.of(queue).items():
            by_priority[priority] += replies.lengths[name] or 0
        models, workers, due = about.models, replies.workers, replies.due
        return QueueState(
            queue,
            waiting=sum(by_priority.values()),
            by_priority=by_priority,
            due_later=None if None in due else sum(count or 0 for count in due),
            in_flight=about.in_flight,
            workers=None if workers is None else _alive(workers, about.now),
            models=None if models is None else _served(models, queue),
            oldest_age_s=max((age for name in replies.lengths if (age := ages.get(name)) is not None), default=None),
        )

    def _ask(self, commands: list[tuple[Any, ...]], refusal: type[ResponseError] = NoPermissionError) -> list[Any]:
        """The replies to some commands in one round trip; None for one that is refused, as this user may not give it.

        Raises RedisError, also for another answer than `refusal`.
        """
        with self._redis.pipeline(transaction=False) as pipe:
            for name, *arguments in commands:
                getattr(pipe, name)(*arguments)
            replies = pipe.execute(raise_on_error=False)
        return [_allowed(reply, refusal) for reply in replies]


def _connect(app: Celery) -> Redis:
    with registry(app) as redis:
        return cast(Redis, redis)


def _allowed(reply: Any, refusal: type[ResponseError]) -> Any:
    if isinstance(reply, Exception) and not isinstance(reply, refusal):
        raise reply
    return None if isinstance(reply, Exception) else reply


def _alive(workers: list[tuple[bytes, float]], now: float) -> list[str]:
    return sorted(name.decode() for name, registered_at in workers if registered_at >= now - SILENT_S)


def _served(models: list[tuple[bool, ServedModel]], queue: str) -> list[str]:
    return [model.id for is_silent, model in models if model.queue == queue and not is_silent]
