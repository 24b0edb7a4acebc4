"""Due times: a job whose time has not come (Celery's `eta` and `countdown`) waits in Redis, not in a worker's memory.

Stock Celery keeps such a job in the memory of the worker that took it: ten thousand of them fill a worker, which then
takes no other job; a restart requeues them all, and each is delivered twice once its visibility timeout is over. Here
the reserve script (worker/queue/reserve.py) moves a message whose time has not come, byte for byte, into the sorted set
`idefics:due:<list>`, scored by that time. Before it reads a list, it takes from that list's set the messages that are
due by the server's clock: they have waited in the queue already. So due jobs run in the order of their times, each
before the jobs of its priority that still wait in the queue.

The script reads the time as Celery and kombu write it. A message with another form of it reaches the worker, which then
moves it into the sorted set.

A cancellation names a job's id. So the sorted set `idefics:due-ids` has a member `<id>\\n<set>` for each waiting job,
with the same score as its message. Up to a millisecond is added to each time, so that few messages have the same
score. A worker reads some ids at a time, and removes canceled jobs from their sets (worker/queue/cancellation.py).

The sets have no time to live: they hold jobs, as the queue's lists do, and a server may evict keys that have one. Redis
removes a set with its last member.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery.worker import state as worker_state
from kombu.message import Message
from redis import Redis
from redis.exceptions import ResponseError

from tasks.redis_keys import DUE, DUE_IDS
from worker.queue.envelope import unix_seconds

#: Ids that a worker reads at a time.
WINDOW = 5_000
#: Messages with the same score that are searched for one id, and their bytes.
MAX_SAME, MAX_SAME_BYTES = 200, 8_000_000
#: Seconds after a job's time until its id is deleted, if a worker without this code took the job and left the id.
STALE_ID_S = 86_400

#: Messages that leave a set in one step, for a worker with kombu's own channel.
RELEASED_AT_ONCE = 100

#: For scripts: the unix seconds of a message's `eta`; nil without one in the usual form. The search
#: cannot match text within a string, since quotes there are escaped. `eta` stands after the body, which may have
#: megabytes. A producer that hides one elsewhere delays only its own job.
ETA = """
local function eta(raw)
  local last = string.sub(raw, -8192)
  local start = string.find(last, '"eta": "', 1, true)
  if not start then return nil end
  local year, month, day, hour, minute, second, fraction, sign, hours, minutes = string.match(
    last, '^(%d%d%d%d)-(%d%d)-(%d%d)T(%d%d):(%d%d):(%d%d)(%.?%d*)([+-])(%d%d):(%d%d)"', start + 8)
  if not year then return nil end
  -- The year begins in March, so that its last day is the leap day.
  if tonumber(month) <= 2 then year, month = year - 1, month + 12 end
  local days = 365 * year + math.floor(year / 4) - math.floor(year / 100) + math.floor(year / 400)
  days = days + math.floor((153 * (month - 3) + 2) / 5) + day - 719469
  local offset = (hours * 60 + minutes) * 60
  if sign == '-' then offset = -offset end
  return days * 86400 + hour * 3600 + minute * 60 + second + tonumber('0' .. fraction) - offset
end
"""

#: For scripts: the id in a message; nil without one in the usual form. Kombu writes it as a property, too.
ID = """
local function id_of(raw)
  local last = string.sub(raw, -8192)
  return string.match(last, '"id": ?"([^"\\\\]+)"') or string.match(last, '"correlation_id": ?"([^"\\\\]+)"')
end
"""

#: Moves messages from `unacked` into their sets; those that are no longer in `unacked` stay where they are.
#: KEYS: unacked, its index, the ids, then each message's set. ARGV: for each its tag, its time, the bytes that end its
#: record behind the message, its id. HDEL comes first: a full server allows what follows a write that frees memory.
DELAY = """
for i = 4, #KEYS do
  local tag, time, ending, id = ARGV[4 * i - 15], ARGV[4 * i - 14], ARGV[4 * i - 13], ARGV[4 * i - 12]
  local record = redis.call('HGET', KEYS[1], tag)
  if record then
    local taken = redis.call('ZSCORE', KEYS[2], tag)
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
    local reply = redis.pcall('ZADD', KEYS[i], time, string.sub(record, 2, #record - ending))
    if type(reply) == 'table' and reply.err then
      redis.call('HSET', KEYS[1], tag, record)
      if taken then redis.call('ZADD', KEYS[2], taken, tag) end
      return reply
    end
    redis.pcall('ZADD', KEYS[3], time, id .. '\\n' .. KEYS[i])
  end
end
return #KEYS - 3
"""

#: Takes a message out of its set before its time. KEYS: unacked, its index, the ids, the set. ARGV: the tag, its score,
#: its id, the end of its record. Returns the message and the server's time; nil if it has left the set.
RESERVE_EARLY = f"""
{ID}
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local seen, bytes = 0, 0
redis.pcall('ZREM', KEYS[3], ARGV[3] .. '\\n' .. KEYS[4])
while seen < {MAX_SAME} and bytes < {MAX_SAME_BYTES} do
  local raws = redis.call('ZRANGEBYSCORE', KEYS[4], ARGV[2], ARGV[2], 'LIMIT', seen, 10)
  for _, raw in ipairs(raws) do
    if id_of(raw) == ARGV[3] then
      redis.call('ZREM', KEYS[4], raw)
      local reply = redis.pcall('HSET', KEYS[1], ARGV[1], '[' .. raw .. ARGV[4])
      if type(reply) == 'table' and reply.err then
        redis.call('ZADD', KEYS[4], ARGV[2], raw)
        return reply
      end
      redis.call('ZADD', KEYS[2], now, ARGV[1])
      return {{raw, now}}
    end
    bytes = bytes + #raw
  end
  if #raws < 10 then return false end
  seen = seen + #raws
end
return false
"""


#: Makes jobs due now, in their order, that wait for their time. KEYS: the ids, then each job's set. ARGV: for each its
#: score and its id. A message that has left its set, or that a full server refuses, stays as it is.
HASTEN = f"""
{ID}
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
for i = 2, #KEYS do
  local score, id = ARGV[2 * i - 3], ARGV[2 * i - 2]
  local due = string.format('%.6f', now + i / 1e6)
  for _, raw in ipairs(redis.call('ZRANGEBYSCORE', KEYS[i], score, score, 'LIMIT', 0, 10)) do
    if id_of(raw) == id then
      redis.pcall('ZADD', KEYS[i], due, raw)
      redis.pcall('ZADD', KEYS[1], due, id .. '\\n' .. KEYS[i])
    end
  end
end
"""


@dataclass(frozen=True, slots=True)
class DueJob:
    """A job that waits for its time."""

    id: str
    #: The set that it is in.
    key: str
    score: float


class DueJobs:
    """All jobs that wait for their time, read in windows, one after the other. Used by one thread."""

    def __init__(self, connect: Callable[[], tuple[Redis, str]]) -> None:
        """`connect` returns a client and the prefix of all keys."""
        self._connect = connect
        self._client: tuple[Redis, str] | None = None
        self._start = 0

    def window(self) -> list[DueJob]:
        """The next window of jobs. Raises what the client raises."""
        self._client = self._client or self._connect()
        client, prefix = self._client
        if self._start == 0:
            client.zremrangebyscore(prefix + DUE_IDS.pattern, "-inf", time.time() - STALE_ID_S)
        found: Any = client.zrange(prefix + DUE_IDS.pattern, self._start, self._start + WINDOW - 1, withscores=True)
        self._start = self._start + WINDOW if len(found) == WINDOW else 0
        return [_due_job(member, score) for member, score in found]


def _due_job(member: bytes, score: float) -> DueJob:
    id, _, key = member.decode(errors="replace").partition("\n")
    return DueJob(id, key, score)


def delay_until_due(message: Message) -> bool:
    """Have Redis keep a checked message until its time, by the server's clock. False for a message to run now.

    To be called while the message is being delivered. With kombu's own channel Celery delays the message itself.
    """
    headers, channel = message.headers, message.channel
    if headers.get("eta") is None or not hasattr(channel, "delay"):
        return False
    at = unix_seconds(headers["eta"])
    if at > channel.taken_at:
        if ends_when_delivered(headers):
            return False
        channel.delay(message.delivery_tag, at, headers["id"])
        return True
    # This worker's own clock may be behind: Celery would wait for it.
    del headers["eta"]
    return False


def hasten(channel: Any, jobs: Sequence[DueJob]) -> None:
    """Make jobs due now. Those that Redis refuses, or that have left their sets, come at their time."""
    keys = [channel.global_keyprefix + DUE_IDS.pattern, *(job.key for job in jobs)]
    arguments = [part for job in jobs for part in (repr(job.score), job.id)]
    try:
        with channel.conn_or_acquire() as client:
            client.execute_command("EVAL", HASTEN, len(keys), *keys, *arguments)
    except (*channel.connection_errors, ResponseError) as error:
        channel.backoff.complain(error)


def ends_when_delivered(headers: Mapping[str, Any]) -> bool:
    """Whether Celery ends a job when it is delivered, even before its time: it is revoked or expired."""
    return headers["id"] in worker_state.revoked or unix_seconds(headers.get("expires")) < time.time()


def release(channel: Any, queues: Iterable[str]) -> None:
    """Put all delayed messages of some queues back into their lists: for a worker with kombu's own channel."""
    client, prefix = Redis(connection_pool=channel.pool), channel.global_keyprefix
    keys = _sets(channel, queues)
    for key, name in keys.items():
        while messages := client.zrange(key, 0, RELEASED_AT_ONCE - 1):
            with client.pipeline() as pipe:
                pipe.lpush(name, *messages)
                pipe.zrem(key, *messages)
                pipe.execute()
    _forget_ids(client, prefix, keys)


def purge(channel: Any, queue: str) -> int:
    """Delete a queue's jobs that wait for their time. Returns their number."""
    client, prefix = Redis(connection_pool=channel.pool), channel.global_keyprefix
    keys = _sets(channel, [queue])
    with client.pipeline() as pipe:
        for key in keys:
            pipe.zcard(key)
            pipe.delete(key)
        sizes = pipe.execute()[::2]
    _forget_ids(client, prefix, keys)
    return sum(sizes)


def _sets(channel: Any, queues: Iterable[str]) -> dict[str, str]:
    """The sets of some queues, each with its list."""
    prefix = channel.global_keyprefix
    names = [channel._q_for_pri(queue, step) for queue, step in itertools.product(queues, channel.priority_steps)]
    return {prefix + DUE.named(prefix + name): prefix + name for name in names}


def _forget_ids(client: Redis, prefix: str, keys: Iterable[str]) -> None:
    ends = tuple(f"\n{key}".encode() for key in keys)
    found: Any = client.zrange(prefix + DUE_IDS.pattern, 0, -1)
    gone = [member for member in found if member.endswith(ends)]
    for start in range(0, len(gone), WINDOW):
        client.zrem(prefix + DUE_IDS.pattern, *gone[start : start + WINDOW])
