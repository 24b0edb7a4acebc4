"""The deliveries of callbacks, in the Redis that holds the queues.

Each delivery is a hash; sorted sets hold the pending ones by the time of their next attempt, one set a host, and the
ended ones by the time of their end. Celery's countdowns are not used, since a message that a worker holds beyond the
visibility timeout is delivered twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal
from urllib.parse import urlsplit

import redis
from celery import Celery

from . import outbox_scripts as scripts
from .outbox_scripts import AT_ONCE, BYTES, DELIVERED, DISABLED, FAILED, GIVEN_UP, HOSTS, SIZES
from .redis_keys import DELIVERY, PENDING_DELIVERIES, broker_prefix

#: A batched delivery is part of another one.
DeliveryState = Literal["pending", "delivered", "failed", "batched"]
ENDED: dict[str, str] = {"delivered": DELIVERED, "failed": FAILED}
STATES = ("pending", "failed", "delivered")

#: Seconds that a pending delivery is kept without any callbacks worker.
PENDING_S = 30 * 86_400
#: Ended deliveries kept of each state, the newest: bounds their memory.
MAX_DELIVERED = 10_000
MAX_FAILED = 100_000
#: URLs kept that answered 410, the newest.
MAX_DISABLED = 10_000

#: Bytes of ended deliveries kept of each state: a body has up to 20 kB.
MAX_ENDED_BYTES = 2**28
#: Bytes that Redis needs for a delivery beside its texts, measured with MEMORY USAGE.
OVERHEAD_BYTES = 1_000


@dataclass(frozen=True, slots=True)
class OutboxBounds:
    """Limits of pending deliveries. Beyond them the oldest are given up, and kept with the failed ones."""

    #: Bytes for one destination (a host and its port), and for all together.
    host_bytes: int = 2**26
    bytes: int = 2**28
    #: Seconds that given-up deliveries are kept.
    keep_s: int = 86_400


@dataclass(frozen=True, slots=True)
class Shares:
    """How many attempts a claim may take for hosts that are not known to answer."""

    #: Hosts that answered recently, and hosts that did not.
    answered: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    #: Attempts at all hosts but those that answered, and at the silent ones among them.
    others: int = 1_000_000
    silent_calls: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to a URL."""

    id: str
    job: str
    event: str
    url: str
    key_id: str
    body: str
    state: DeliveryState = "pending"
    attempts: int = 0
    #: The result of its last attempt.
    note: str = ""
    #: Unix seconds.
    created: float = 0.0
    changed: float = 0.0
    #: The batch that it was sent in.
    batch: str = ""
    #: Lease token of the worker that has claimed it.
    token: str = ""
    #: W3C's `traceparent` of its job, or those of its members' jobs with blanks between them.
    traces: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.lower()


def delivery_id(job: str, event: str, *end: str) -> str:
    """The id of a delivery. It is the same for each run that records this end, so that it is recorded once.

    `end` distinguishes it from the end of another job with the same id.
    """
    return "msg_" + hashlib.sha256("\n".join((job, event, *end)).encode()).hexdigest()[:32]


def batch_id(members: Iterable[str]) -> str:
    return delivery_id("\n".join(sorted(members)), "job.batch")


def outbox_of(app: Celery) -> Outbox:
    """The outbox of an app's broker."""
    return Outbox(connect(app), prefix=broker_prefix(app))


def connect(app: Celery, client: type[redis.Redis] = redis.Redis) -> redis.Redis:
    """A client of an app's broker, for any scheme of its URL, with the app's options."""
    with app.connection_for_write() as connection:
        pool = connection.default_channel.pool
    # Kombu's limit of 10 is for its consumer; here each thread may need a connection.
    pool.max_connections = max(pool.max_connections, 1_024)
    return client(connection_pool=pool)


class Outbox:
    """The outbox. Every change is one step in Redis, so that a kill never leaves a delivery half changed."""

    def __init__(
        self,
        client: redis.Redis,
        bounds: OutboxBounds | None = None,
        tell: Callable[[str, int], None] | None = None,
        prefix: str = "",
    ) -> None:
        """`tell` is called with a new delivery's host and the number given up for it; `prefix`: of all keys."""
        # redis-py's types say that each answer may be awaitable.
        self._redis: Any = client
        self._prefix = prefix
        self._bounds = bounds or OutboxBounds()
        self._tell = tell
        self._add = self._script(scripts.ADD)
        self._claim = self._script(scripts.CLAIM)
        self._settle = self._script(scripts.SETTLE)
        self._remove = self._script(scripts.REMOVE)
        self._batch = self._script(scripts.BATCH)
        self._replay = self._script(scripts.REPLAY)
        self._trim = self._script(scripts.TRIM)
        self._recount_host = self._script(scripts.RECOUNT_HOST)
        self._recount = self._script(scripts.RECOUNT)

    def _script(self, text: str) -> Any:
        # A JSON string is also a Lua string.
        return self._redis.register_script(f"local prefix = {json.dumps(self._prefix)}\n{scripts.COMMON}{text}")

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _keys(self, delivery: Delivery) -> list[str]:
        names = (DELIVERY.named(delivery.id), PENDING_DELIVERIES.named(delivery.host), HOSTS)
        return [self._key(name) for name in names]

    def add(self, delivery: Delivery, wait_s: float = 0.0) -> bool:
        """Record a delivery, due in `wait_s` seconds. False if it is already recorded."""
        now = time.time()
        pairs = _pairs({**asdict(delivery), "created": now, "changed": now})
        bounds = [self._bounds.host_bytes, self._bounds.bytes, self._bounds.keep_s]
        is_added, given_up = self._add(
            self._keys(delivery), [*_arguments(delivery), wait_s, size_of(delivery), *bounds, *pairs]
        )
        if given_up and self._tell is not None:
            self._tell(delivery.host, given_up)
        return bool(is_added)

    def claim(
        self,
        free: int,
        lease_s: float,
        *,
        per_host: int = 1_000,
        each: int = 1,
        busy: Mapping[str, int] | None = None,
        shares: Shares | None = None,
    ) -> list[Delivery]:
        """Claim due deliveries for `free` attempts: hosts by their longest wait, each up to `per_host` less its `busy`.

        An attempt may have `each` deliveries. They are due again after `lease_s` unless they are settled before.
        """
        shares = shares or Shares()
        known = len(shares.answered) + len(shares.silent)
        plan = {
            "free": free,
            "per_host": per_host,
            "each": each,
            "busy": dict(busy or {}),
            "answered": sorted(shares.answered),
            "silent": sorted(shares.silent),
            "others": shares.others,
            "silent_calls": shares.silent_calls,
            # Hosts to read, beside those that are skipped.
            "window": known + len(busy or {}) + free,
        }
        ids = self._claim([self._key(HOSTS)], [PENDING_S, uuid.uuid4().hex, lease_s, json.dumps(plan)])
        return self.read([id.decode() for id in ids])

    def put_back(self, delivery: Delivery) -> bool:
        """Release a claimed delivery that was not attempted: it is due at once."""
        return self._settled(delivery, "", 0.0, PENDING_S)

    def again(self, delivery: Delivery, wait_s: float, note: str) -> bool:
        """Record a failed attempt; the next one is due in `wait_s` seconds."""
        tried = {"attempts": delivery.attempts + 1, "note": note}
        return self._settled(delivery, "", wait_s, PENDING_S, tried)

    def end(self, delivery: Delivery, state: Literal["delivered", "failed"], note: str, keep_s: int) -> bool:
        """End a delivery without further attempts. `note`: the result of the last one."""
        tried = {"state": state, "attempts": delivery.attempts + 1, "note": note}
        return self._settled(delivery, state, 0.0, keep_s, tried)

    def _settled(
        self, delivery: Delivery, into: str, wait_s: float, ttl_s: int, changes: dict[str, Any] | None = None
    ) -> bool:
        pairs = _pairs({"changed": time.time(), **(changes or {})})
        arguments = [*_arguments(delivery), delivery.token, into, wait_s, ttl_s, *pairs]
        return bool(self._settle(self._keys(delivery), arguments))

    def batch(self, batch: Delivery, members: Sequence[Delivery], lease_s: float, keep_s: int) -> bool:
        """Replace claimed deliveries to one host by a batch, which is claimed from the start."""
        now = time.time()
        pairs = _pairs({**asdict(batch), "created": now, "changed": now})
        ids = [member.id for member in members]
        numbers = [batch.token, lease_s, keep_s, size_of(batch), len(ids)]
        return bool(self._batch(self._keys(batch), [*_arguments(batch), *numbers, *ids, *pairs]))

    def replay(self, id: str) -> bool:
        """Send a delivery again from its first attempt on, at once and under its id. False if it does not exist.

        One that was sent in a batch is sent with the whole batch. Its URL, if disabled, is enabled.
        """
        found = self.read([id])
        if not found:
            return False
        if found[0].state == "batched":
            return self.replay(found[0].batch)
        self._redis.zrem(self._key(DISABLED), found[0].url)
        return bool(self._replay(self._keys(found[0]), [*_arguments(found[0]), size_of(found[0])]))

    def remove(self, delivery: Delivery) -> bool | None:
        """Remove a delivery that no worker has attempted or claimed. False if one has; None if it does not exist."""
        return {1: True, 0: None}.get(int(self._remove(self._keys(delivery), _arguments(delivery))), False)

    def read(self, ids: Iterable[str]) -> list[Delivery]:
        """The deliveries with these ids that still exist."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for id in ids:
                pipeline.hgetall(self._key(DELIVERY.named(id)))
            return [_delivery(found) for found in pipeline.execute() if found]

    def listed(self, state: str, limit: int) -> list[Delivery]:
        """Deliveries of a state: pending ones by their next attempt, ended ones the newest first."""
        return self.read(self.ids(state)[:limit])

    def ids(self, state: str) -> list[str]:
        """The ids of all deliveries of a state, in the order of `listed`."""
        if state in ENDED:
            return [id.decode() for id in self._redis.zrevrange(self._key(ENDED[state]), 0, -1)]
        pending = self._each_host("zrange", 0, -1, withscores=True)
        return [id.decode() for id, _ in sorted(itertools.chain(*pending), key=lambda found: found[1])]

    def counts(self) -> dict[str, int]:
        """The number of deliveries of each state and, if there are any, of those given up because they exceeded a
        limit."""
        pending = sum(self._each_host("zcard"))
        given_up = int(self._redis.hget(self._key(BYTES), GIVEN_UP) or 0)
        found = {"pending": pending, **{state: int(self._redis.zcard(self._key(key))) for state, key in ENDED.items()}}
        return {**found, "given_up": given_up} if given_up else found

    def bytes(self) -> dict[str, int]:
        """Bytes of pending deliveries by host, the largest first."""
        found = {name.decode(): int(size) for name, size in self._redis.hgetall(self._key(BYTES)).items()}
        hosts = {name: size for name, size in found.items() if not name.startswith(" ")}
        return dict(sorted(hosts.items(), key=lambda each: -each[1]))

    def recount(self) -> int:
        """Recount the bytes of pending deliveries, in case that keys were removed or added without counting."""
        hosts = {host.decode() for host in self._redis.zrange(self._key(HOSTS), 0, -1)} | set(self.bytes())
        for host in hosts:
            self._recount_host([self._key(HOSTS)], [PENDING_S, host, OVERHEAD_BYTES])
        return int(self._recount([self._key(BYTES), self._key(SIZES)], [PENDING_S]))

    def _each_host(self, command: str, *arguments: Any, **options: Any) -> list[Any]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for host in self._redis.zrange(self._key(HOSTS), 0, -1):
                getattr(pipeline, command)(self._key(PENDING_DELIVERIES.named(host.decode())), *arguments, **options)
            return list(pipeline.execute())

    def disable(self, url: str, seconds: float) -> None:
        """Disable a URL: deliveries to it are not attempted for these seconds."""
        now = time.time()
        with self._redis.pipeline() as pipeline:
            pipeline.zadd(self._key(DISABLED), {url: now + seconds})
            pipeline.zremrangebyscore(self._key(DISABLED), "-inf", now)
            pipeline.zremrangebyrank(self._key(DISABLED), 0, -MAX_DISABLED - 1)
            pipeline.expire(self._key(DISABLED), int(seconds) + 1)
            pipeline.execute()

    def enable(self, url: str) -> bool:
        return bool(self._redis.zrem(self._key(DISABLED), url))

    def is_disabled(self, url: str) -> bool:
        until = self._redis.zscore(self._key(DISABLED), url)
        return until is not None and float(until) > time.time()

    def disabled(self) -> dict[str, float]:
        """Disabled URLs, which answered 410, with the unix seconds until which they are disabled."""
        found = self._redis.zrangebyscore(self._key(DISABLED), time.time(), "+inf", withscores=True)
        return {url.decode(): until for url, until in found}

    def trim(self, keep_s: int) -> None:
        """Delete ended deliveries that are too old, too many or too large together."""
        for state, most in (("delivered", MAX_DELIVERED), ("failed", MAX_FAILED)):
            while self._trim([self._key(ENDED[state])], [state, keep_s, most, MAX_ENDED_BYTES]) >= AT_ONCE:
                """More are left."""


def size_of(delivery: Delivery) -> int:
    """Approximate bytes that it takes in Redis."""
    return len(delivery.body.encode()) + len(delivery.url.encode()) + OVERHEAD_BYTES


def _arguments(delivery: Delivery) -> list[Any]:
    return [PENDING_S, delivery.host, delivery.id]


def _pairs(values: dict[str, Any]) -> list[Any]:
    return [item for pair in values.items() for item in pair]


_TYPES = {"attempts": int, "created": float, "changed": float}
_NAMES = [field.name for field in fields(Delivery)]


def _delivery(found: dict[bytes, bytes]) -> Delivery:
    texts = {name: found.get(name.encode(), b"").decode() for name in _NAMES}
    values: dict[str, Any] = {name: _TYPES[name](text or 0) if name in _TYPES else text for name, text in texts.items()}
    return Delivery(**values)
