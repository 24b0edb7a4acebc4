"""How many jobs come before a waiting one in its queue.

Redis is asked at most once a second for all watchers of a process, and looks at a bounded part of the queue.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError, ResponseError

from .errors import ConfigurationError
from .queue_lists import QueueLists
from .redis_keys import broker_prefix
from .setup_check import registry

#: Seconds between two looks at a queue.
LOOK_INTERVAL_S = 1.0
#: Messages that are looked at, and their bytes: a long script blocks Redis.
MAX_MESSAGES, MAX_BYTES = 1_000, 1_000_000

#: KEYS: the queue's lists, the most urgent first. ARGV: MAX_MESSAGES and MAX_BYTES. Returns the ids of the messages
#: that are taken next, in order. They stand at the messages' ends, behind bodies that may have megabytes.
NEXT_IDS = """
local ids, bytes = {}, 0
for _, key in ipairs(KEYS) do
  for n = 1, redis.call('LLEN', key) do
    if #ids >= tonumber(ARGV[1]) or bytes >= tonumber(ARGV[2]) then return ids end
    local raw = redis.call('LINDEX', key, -n)
    bytes = bytes + #raw
    ids[#ids + 1] = string.match(string.sub(raw, -8192), '"correlation_id": ?"([^"]*)"') or ''
  end
end
return ids
"""


@dataclass(frozen=True, slots=True)
class _Queue:
    """A queue at one time."""

    #: Ids of the jobs that are taken next, in order: all of them, or the first ones.
    ids: Sequence[str] = ()
    #: Waiting jobs by priority.
    lengths: Mapping[int, int] = field(default_factory=dict)

    def ahead(self, id: str, priority: int) -> int | None:
        """Jobs that come before one with this priority, at most. None: not known, or it is not in the queue."""
        if id in self.ids:
            return self.ids.index(id)
        if len(self.ids) >= sum(self.lengths.values()):
            return None
        return max(0, sum(count for step, count in self.lengths.items() if step <= priority) - 1)


class QueuePositions:
    """Positions in an app's queues. Thread-safe."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lists = QueueLists(app)
        self._redis: Any = None
        #: Whether this user may read messages.
        self._may_read = True
        self._looks: dict[str, tuple[float, _Queue]] = {}
        self._lock = threading.Lock()

    def ahead(self, queue: str, id: str, priority: int) -> int | None:
        """Jobs that come before a waiting one, at most. None: not known, or it is not in the queue. Never raises."""
        with self._lock:
            looked_at, found = self._looks.get(queue, (float("-inf"), _Queue()))
            if time.monotonic() - looked_at >= LOOK_INTERVAL_S:
                found = self._look(queue)
                self._looks[queue] = time.monotonic(), found
        return found.ahead(id, priority)

    def _look(self, queue: str) -> _Queue:
        try:
            if self._redis is None:
                with registry(self._app) as redis:
                    self._redis = redis
            return self._read(queue)
        except (RedisError, OperationalError, OSError, ConfigurationError):
            # It is away, no Redis, or this user may not count: watchers do without.
            self._redis = None
            return _Queue()

    def _read(self, queue: str) -> _Queue:
        lists = self._lists.of(queue)
        names = [broker_prefix(self._app) + name for name in lists]
        # Before the lists are counted: a job that is in none of them was taken, if all were looked through.
        ids = self._next_ids(names)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.llen(name)
            counts = pipe.execute()
        lengths = dict.fromkeys(self._lists.priorities, 0)
        for step, count in zip(lists.values(), counts, strict=True):
            lengths[step] += count
        return _Queue([id.decode(errors="replace") for id in ids], lengths)

    def _next_ids(self, names: Sequence[str]) -> list[bytes]:
        if not self._may_read:
            return []
        try:
            return list(self._redis.eval(NEXT_IDS, len(names), *names, MAX_MESSAGES, MAX_BYTES))
        except ResponseError:
            # Not asked for again: each refusal is an entry of the server's log.
            self._may_read = False
            return []


_positions: weakref.WeakKeyDictionary[Celery, QueuePositions] = weakref.WeakKeyDictionary()


def positions_of(app: Celery) -> QueuePositions:
    """The app's QueuePositions, the same one at each call."""
    return _positions.setdefault(app, QueuePositions(app))
