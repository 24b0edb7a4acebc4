"""The review list: doubtful answers that wait for a person, and the decisions, in the results' Redis.

Workers put items on it; `idefics-jobs review` and other programs with a worker's rights read and decide them. It is
bounded by number, bytes and age, as the list of failed jobs is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from ..errors import ConfigurationError, InvalidRequest
from ..outbox import Outbox, OutboxBounds, connect
from ..redis_keys import broker_prefix, results_prefix
from . import scripts
from .decision_callback import WAIT_S, delivery_of
from .items import MAX_ANSWER_CHARS, Decision, Entry, ReviewItem, decision_of, entry_of

#: Entries that are read at once.
CHUNK = 500
#: Seconds for which a decision can be undone if its callback, where it has one, has not gone out.
UNDO_S = 600.0
#: Seconds after which a decision whose callback is not known to be in the outbox has it added by the next reviewer's
#: call: the process that decided it was killed in between, or the broker was away.
UNSENT_S = 30.0
#: The workers bound the outbox: a decision adds little, and pushes no other callback out.
_NO_BOUNDS = OutboxBounds(host_bytes=2**52, bytes=2**52)


@dataclass(frozen=True, slots=True)
class ReviewBounds:
    """Limits of the list, decisions included."""

    items: int
    bytes: int
    ttl_s: int


class ReviewList:
    """The review list of an app's workers. Thread-safe."""

    def __init__(self, app: Celery, redis: Redis | None = None) -> None:
        """`redis`: a client of the results' Redis, by default the app's own.

        Raises ConfigurationError (a ValueError) for an app whose results are not in Redis.
        """
        if not isinstance(app.backend, RedisBackend):
            raise ConfigurationError("The review list is in the results' Redis: give an app that has it as backend.")
        self._app = app
        self._redis: Any = redis or app.backend.client
        self._keys = [results_prefix(app) + key for key in scripts.KEYS]
        self._waiting, self._decided, self._undoable, self._unsent = self._keys[:4]
        self._items, self._pictures, self._decisions, _ = self._keys[4:]

    # Reading

    def count(self) -> int:
        """Number of items that wait."""
        return int(self._redis.zcard(self._waiting))

    def waiting(self, limit: int = 100) -> list[ReviewItem]:
        """Items that wait, the oldest first."""
        self._send_unsent()
        ids = [id.decode() for id in self._redis.zrange(self._waiting, 0, limit - 1)] if limit > 0 else []
        return [entry.item for entry in self._entries(ids) if entry is not None]

    def get(self, id: str) -> ReviewItem | None:
        """An item, waiting or decided; None if it is not on the list."""
        entry = self._entry(id)
        return None if entry is None else entry.item

    def picture(self, id: str, index: int) -> bytes | None:
        """A JPEG copy of an item's picture, the first one being 0. None if there is none, or none any more."""
        entry = self._entry(id)
        if entry is None or not 0 <= index < len(entry.picture_bytes):
            return None
        start = sum(entry.picture_bytes[:index])
        copies = self._redis.hget(self._pictures, id) or b""
        return bytes(copies[start : start + entry.picture_bytes[index]]) or None

    def decision(self, id: str) -> Decision | None:
        """The decision about an item; None while it waits, or if it is not on the list."""
        found = self._redis.hget(self._decisions, id)
        return None if found is None else decision_of(json.loads(found))

    def decisions(self) -> Iterator[tuple[ReviewItem, Decision]]:
        """All decided items, the first decided first."""
        ids = [id.decode() for id in self._redis.zrange(self._decided, 0, -1)]
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            decisions = self._redis.hmget(self._decisions, chunk)
            for entry, decision in zip(self._entries(chunk), decisions, strict=True):
                # Another process may have undone the decision, or a worker dropped the item, since the ids were read.
                if entry is not None and decision is not None:
                    yield entry.item, decision_of(json.loads(decision))

    # Deciding

    def decide(self, id: str, answer: str | None) -> bool:
        """Record a person's answer, and send it as the job's callback. None: no answer is right, or it is not clear.

        False if it was decided already, or is not on the list. Raises InvalidRequest for an answer that is too long and
        none of the item's own.
        """
        self._send_unsent()
        entry = self._entry(id)
        if entry is None:
            return False
        is_own = answer in [each.text for each in entry.item.answers]
        if answer is not None and len(answer) > MAX_ANSWER_CHARS and not is_own:
            raise InvalidRequest(f"The answer has {len(answer)} characters: {MAX_ANSWER_CHARS} are allowed.")
        decision = Decision(id, answer, time.time())
        arguments = [id, repr(decision.decided), json.dumps(asdict(decision)), entry.ttl_s]
        if not self._run(scripts.DECIDE, *arguments, self._settled(), int(entry.callback is not None)):
            return False
        self._send(entry, decision)
        return True

    def undo(self, id: str) -> bool:
        """Let a decided item wait again. False if its callback has gone out, it was undone, or it is too long ago."""
        entry, decision = self._entry(id), self.decision(id)
        if entry is None or decision is None or time.time() - decision.decided > UNDO_S:
            return False
        delivery = delivery_of(entry, decision)
        if delivery is None:
            return self._undone(entry, decision)
        # From here on a killed process leaves a decision whose callback the next reviewer's call adds again.
        with self._redis.pipeline() as pipeline:
            pipeline.zadd(self._unsent, {id: repr(decision.decided)}, nx=True)
            pipeline.expire(self._unsent, entry.ttl_s)
            was_sent, _ = pipeline.execute()
        is_removed = self._outbox.remove(delivery)
        if is_removed or (is_removed is None and not was_sent):
            return self._undone(entry, decision)
        self._redis.zrem(self._unsent, id)
        return False

    def _undone(self, entry: Entry, decision: Decision) -> bool:
        return bool(self._run(scripts.UNDO, entry.item.id, repr(decision.decided), repr(entry.item.created)))

    def _send_unsent(self) -> None:
        late = self._redis.zrangebyscore(self._unsent, "-inf", time.time() - UNSENT_S)
        for id in (each.decode() for each in late):
            entry, decision = self._entry(id), self.decision(id)
            if entry is not None and decision is not None:
                self._send(entry, decision)
            else:
                self._redis.zrem(self._unsent, id)

    def _send(self, entry: Entry, decision: Decision) -> None:
        delivery = delivery_of(entry, decision)
        if delivery is None:
            return
        # While the broker is away it stays unsent.
        with contextlib.suppress(RedisError, OperationalError):
            self._outbox.add(delivery, WAIT_S)
            self._redis.zrem(self._unsent, decision.id)

    # A worker's side

    def put(self, item: ReviewItem, pictures: Sequence[bytes], bounds: ReviewBounds, **stored: Any) -> bool:
        """Put an item with JPEG copies of its pictures on the list; `stored`: further fields of its Entry.

        False if another run of the job was decided already. Raises ValueError if it is larger than the whole list may
        be.
        """
        entry = Entry(item, tuple(map(len, pictures)), ttl_s=bounds.ttl_s, **stored)
        text, copies = json.dumps(entry.as_dict()).encode(), b"".join(pictures)
        if len(text) + len(copies) > bounds.bytes:
            raise ValueError(f"it is larger than {bounds.bytes} bytes: raise IDEFICS_REVIEW_MAX_BYTES")
        limits = [bounds.items, bounds.bytes, bounds.ttl_s, self._settled()]
        submitted = json.dumps(entry.submitted_at)
        return bool(self._run(scripts.PUT, item.id, repr(item.created), text, copies, submitted, *limits))

    # Redis

    def _run(self, script: str, *arguments: Any) -> int:
        return int(self._redis.eval(script, len(self._keys), *self._keys, *arguments))

    def _settled(self) -> str:
        """The time before which decisions cannot be undone any more."""
        return repr(time.time() - UNDO_S)

    def _entry(self, id: str) -> Entry | None:
        return self._entries([id])[0]

    def _entries(self, ids: Sequence[str]) -> list[Entry | None]:
        found = self._redis.hmget(self._items, ids) if ids else []
        return [None if each is None else entry_of(json.loads(each)) for each in found]

    @functools.cached_property
    def _outbox(self) -> Outbox:
        return Outbox(connect(self._app), _NO_BOUNDS, prefix=broker_prefix(self._app))
