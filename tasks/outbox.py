"""The deliveries of callbacks, in the Redis that holds the queues.

Each delivery is a hash; sorted sets hold the pending ones by the time of their next attempt, one set a host, and the
ended ones by the time of their end. Not Celery's countdowns: a message held beyond the visibility timeout comes twice.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal
from urllib.parse import urlsplit

import redis
from celery import Celery

PREFIX = "idefics:callbacks:"
#: Hosts with pending deliveries, by the time of their next attempt. Each host has a sorted set of its own, so that
#: what is due for a slow one stands in no other's way.
HOSTS = PREFIX + "hosts"
DELIVERED, FAILED, DISABLED = (PREFIX + name for name in ("delivered", "failed", "disabled"))

#: A batched delivery is part of another one.
State = Literal["pending", "delivered", "failed", "batched"]
ENDED: dict[str, str] = {"delivered": DELIVERED, "failed": FAILED}
STATES = ("pending", "failed", "delivered")

#: Seconds that a pending delivery is kept without any callbacks worker.
PENDING_S = 30 * 86_400
#: Ended deliveries kept, the newest of each state: what bounds their memory.
MAX_DELIVERED = 10_000
MAX_FAILED = 100_000
#: URLs that answered 410, the newest.
MAX_DISABLED = 10_000

# Keys begin alike: the delivery, its host's pending ones, the hosts. Arguments too: seconds that pending ones are kept,
# the host, the id.
# The server's clock counts: workers' may differ by more than a lease.
_COMMON = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function sort_in(pending, hosts, ttl, host)
  local first = redis.call('ZRANGE', pending, 0, 0, 'WITHSCORES')
  if first[2] then
    redis.call('ZADD', hosts, first[2], host)
    redis.call('EXPIRE', hosts, ttl)
    redis.call('EXPIRE', pending, ttl)
  else
    redis.call('ZREM', hosts, host)
  end
end
"""

_ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[3])
sort_in(KEYS[2], KEYS[3], ARGV[1], ARGV[2])
return 1
"""

# A claimed delivery is due again when its lease ends: so one whose worker was killed is not lost.
_CLAIM = """
local ttl, prefix, token, lease = ARGV[1], ARGV[2], ARGV[3], now + ARGV[4]
local free, per_host, each = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local busy, claimed = {}, {}
for index = 8, #ARGV, 2 do busy[ARGV[index]] = tonumber(ARGV[index + 1]) end
for _, host in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  local slots = math.min(free, per_host - (busy[host] or 0))
  if free <= 0 then break end
  if slots > 0 then
    local pending = prefix .. 'pending:' .. host
    local ids = redis.call('ZRANGEBYSCORE', pending, '-inf', now, 'LIMIT', 0, slots * each)
    for _, id in ipairs(ids) do
      local record = prefix .. 'delivery:' .. id
      if redis.call('EXISTS', record) == 1 then
        redis.call('HDEL', record, 'token')
        redis.call('HSET', record, 'token', token)
        redis.call('ZADD', pending, lease, id)
        claimed[#claimed + 1] = id
      else
        redis.call('ZREM', pending, id)
      end
    end
    free = free - math.min(slots, #ids)
    sort_in(pending, KEYS[1], ttl, host)
  end
end
return claimed
"""

# In each script what needs no memory comes first: a full server refuses a script whose first write may need some, and
# what was sent and cannot be noted is sent again.
# Only who holds the claim may say how it went: another worker may have taken it over.
_SETTLE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[4] then return 0 end
redis.call('HDEL', KEYS[1], 'token')
redis.call('HSET', KEYS[1], unpack(ARGV, 7))
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZREM', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[4], now + ARGV[5], ARGV[3])
redis.call('EXPIRE', KEYS[4], ARGV[6])
sort_in(KEYS[2], KEYS[3], ARGV[1], ARGV[2])
return 1
"""

# The batch takes its members' place in one step: each event is in one pending delivery, whoever is killed when.
_BATCH = """
local members = #KEYS - 3
for index = 1, members do
  if redis.call('HGET', KEYS[3 + index], 'token') ~= ARGV[4] then return 0 end
end
for index = 1, members do
  redis.call('HDEL', KEYS[3 + index], 'token', 'body')
  redis.call('HSET', KEYS[3 + index], 'state', 'batched', 'batch', ARGV[3])
  redis.call('EXPIRE', KEYS[3 + index], ARGV[6])
  redis.call('ZREM', KEYS[2], ARGV[6 + index])
end
redis.call('HSET', KEYS[1], unpack(ARGV, 7 + members))
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], now + ARGV[5], ARGV[3])
sort_in(KEYS[2], KEYS[3], ARGV[1], ARGV[2])
return 1
"""

_REPLAY = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'state', 'pending', 'attempts', 0, 'note', 'replayed', 'changed', now)
redis.call('HDEL', KEYS[1], 'token')
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[3])
redis.call('ZREM', KEYS[5], ARGV[3])
redis.call('ZADD', KEYS[2], now, ARGV[3])
sort_in(KEYS[2], KEYS[3], ARGV[1], ARGV[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to a URL."""

    id: str
    job: str
    event: str
    url: str
    key_id: str
    body: str
    state: State = "pending"
    attempts: int = 0
    #: What its last attempt met.
    note: str = ""
    #: Unix seconds.
    created: float = 0.0
    changed: float = 0.0
    #: The delivery that it went out with.
    batch: str = ""
    #: Of the worker that holds it.
    token: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.lower()


def delivery_id(job: str, event: str) -> str:
    """The same for each time that a job is seen to end so: it is recorded once."""
    return "msg_" + hashlib.sha256(f"{job}\n{event}".encode()).hexdigest()[:32]


def batch_id(members: Iterable[str]) -> str:
    return delivery_id("\n".join(sorted(members)), "job.batch")


def connect(app: Celery) -> redis.Redis:
    """The Redis of an app's queues, whatever its URL's scheme, with the app's own options."""
    with app.connection_for_write() as connection:
        pool = connection.default_channel.pool
    # kombu's 10 are for its consumer; here each thread may need one.
    pool.max_connections = max(pool.max_connections, 1_024)
    return redis.Redis(connection_pool=pool)


class Outbox:
    """Every change is one step in Redis, so that a kill leaves a delivery before it or after it."""

    def __init__(self, client: redis.Redis) -> None:
        # redis-py types each answer as an awaitable too.
        self._redis: Any = client
        self._add = self._script(_ADD)
        self._claim = self._script(_CLAIM)
        self._settle = self._script(_SETTLE)
        self._batch = self._script(_BATCH)
        self._replay = self._script(_REPLAY)

    def _script(self, text: str) -> Any:
        return self._redis.register_script(_COMMON + text)

    def add(self, delivery: Delivery, wait_s: float = 0.0) -> bool:
        """Record a delivery, due in so many seconds. False where it is already there."""
        now = time.time()
        pairs = _pairs({**asdict(delivery), "created": now, "changed": now})
        return bool(self._add(_keys(delivery), [*_arguments(delivery), wait_s, *pairs]))

    def claim(
        self, free: int, lease_s: float, *, per_host: int = 1_000, each: int = 1, busy: Mapping[str, int] | None = None
    ) -> list[Delivery]:
        """Take what is due, for `free` calls: hosts by their longest wait, each for `per_host` calls less its `busy`.

        A call may take `each` deliveries. They are due again in `lease_s` where nothing is heard of them.
        """
        numbers = [lease_s, free, per_host, each, *_pairs(dict(busy or {}))]
        ids = self._claim([HOSTS], [PENDING_S, PREFIX, uuid.uuid4().hex, *numbers])
        return self.read([id.decode() for id in ids])

    def put_back(self, delivery: Delivery) -> bool:
        """A claimed delivery that was not tried: due at once."""
        return self._settled(delivery, _pending(delivery), 0.0, PENDING_S)

    def again(self, delivery: Delivery, wait_s: float, note: str) -> bool:
        """An attempt failed; the next one is due in so many seconds."""
        tried = {"attempts": delivery.attempts + 1, "note": note}
        return self._settled(delivery, _pending(delivery), wait_s, PENDING_S, tried)

    def end(self, delivery: Delivery, state: Literal["delivered", "failed"], note: str, keep_s: int) -> bool:
        """No attempt follows. `note` says what the last one met."""
        tried = {"state": state, "attempts": delivery.attempts + 1, "note": note}
        return self._settled(delivery, ENDED[state], 0.0, keep_s, tried)

    def _settled(
        self, delivery: Delivery, into: str, wait_s: float, ttl_s: int, changes: dict[str, Any] | None = None
    ) -> bool:
        pairs = _pairs({"changed": time.time(), **(changes or {})})
        arguments = [*_arguments(delivery), delivery.token, wait_s, ttl_s, *pairs]
        return bool(self._settle([*_keys(delivery), into], arguments))

    def batch(self, batch: Delivery, members: Sequence[Delivery], lease_s: float, keep_s: int) -> bool:
        """Let a delivery, claimed from the start, take the place of claimed ones to the same host."""
        now = time.time()
        pairs = _pairs({**asdict(batch), "created": now, "changed": now})
        keys = [*_keys(batch), *(_record(member.id) for member in members)]
        ids = [member.id for member in members]
        return bool(self._batch(keys, [*_arguments(batch), batch.token, lease_s, keep_s, *ids, *pairs]))

    def replay(self, id: str) -> bool:
        """Attempt a delivery again from its first attempt on, at once and under its id. False where it is not there.

        One that went out in a batch goes out with the batch. Its URL, if disabled, is enabled.
        """
        found = self.read([id])
        if not found:
            return False
        if found[0].state == "batched":
            return self.replay(found[0].batch)
        self._redis.zrem(DISABLED, found[0].url)
        return bool(self._replay([*_keys(found[0]), DELIVERED, FAILED], _arguments(found[0])))

    def read(self, ids: Iterable[str]) -> list[Delivery]:
        """Those that are still there."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for id in ids:
                pipeline.hgetall(_record(id))
            return [_delivery(found) for found in pipeline.execute() if found]

    def listed(self, state: str, limit: int) -> list[Delivery]:
        """Pending ones by their next attempt, ended ones the newest first."""
        return self.read(self.ids(state)[:limit])

    def ids(self, state: str) -> list[str]:
        """Those of `listed`, all."""
        if state in ENDED:
            return [id.decode() for id in self._redis.zrevrange(ENDED[state], 0, -1)]
        pending = self._each_host("zrange", 0, -1, withscores=True)
        return [id.decode() for id, _ in sorted(itertools.chain(*pending), key=lambda found: found[1])]

    def counts(self) -> dict[str, int]:
        pending = sum(self._each_host("zcard"))
        return {"pending": pending, **{state: int(self._redis.zcard(key)) for state, key in ENDED.items()}}

    def _each_host(self, command: str, *arguments: Any, **options: Any) -> list[Any]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for host in self._redis.zrange(HOSTS, 0, -1):
                getattr(pipeline, command)(f"{PREFIX}pending:{host.decode()}", *arguments, **options)
            return list(pipeline.execute())

    def disable(self, url: str, seconds: float) -> None:
        """Let no delivery to a URL be attempted for so long."""
        now = time.time()
        with self._redis.pipeline() as pipeline:
            pipeline.zadd(DISABLED, {url: now + seconds})
            pipeline.zremrangebyscore(DISABLED, "-inf", now)
            pipeline.zremrangebyrank(DISABLED, 0, -MAX_DISABLED - 1)
            pipeline.expire(DISABLED, int(seconds) + 1)
            pipeline.execute()

    def enable(self, url: str) -> bool:
        return bool(self._redis.zrem(DISABLED, url))

    def is_disabled(self, url: str) -> bool:
        until = self._redis.zscore(DISABLED, url)
        return until is not None and float(until) > time.time()

    def disabled(self) -> dict[str, float]:
        """URLs that answered 410, and until when (unix seconds) they get nothing."""
        found = self._redis.zrangebyscore(DISABLED, time.time(), "+inf", withscores=True)
        return {url.decode(): until for url, until in found}

    def trim(self, keep_s: int) -> None:
        """Forget ended deliveries that are too old or too many."""
        for key, most in ((DELIVERED, MAX_DELIVERED), (FAILED, MAX_FAILED)):
            self._redis.zremrangebyscore(key, "-inf", time.time() - keep_s)
            excess = int(self._redis.zcard(key)) - most
            if excess > 0:
                gone = [id.decode() for id, _ in self._redis.zpopmin(key, excess)]
                self._redis.delete(*map(_record, gone))


def _record(id: str) -> str:
    return f"{PREFIX}delivery:{id}"


def _pending(delivery: Delivery) -> str:
    return f"{PREFIX}pending:{delivery.host}"


def _keys(delivery: Delivery) -> list[str]:
    return [_record(delivery.id), _pending(delivery), HOSTS]


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
