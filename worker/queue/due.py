"""Due times: a job whose time has not come (Celery's `eta` and `countdown`) waits in Redis, not in a worker's memory.

Stock Celery keeps such a job in the memory of the worker that took it: ten thousand of them fill a worker, which then
takes no other job; a restart requeues them all, and each comes twice once its visibility timeout is over. Here the
reserve script (worker/queue/take.py) moves a message that it meets before its time, byte for byte, into the sorted set
`idefics:due:<list>`, scored by that time. Before it reads a list it takes from that list's set what is due by the
server's clock: the job has waited in the queue already. So due jobs run in the order of their times, each before those
of its priority that still wait in the queue.

The script reads the time as Celery and kombu write it. Other forms reach the worker, which has the same done for them.

The sets have no time to live: they hold jobs, as the queue's lists do, and an eviction policy for keys with one would
lose them. Redis removes a set with its last member.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

from celery.worker import state as worker_state
from kombu.message import Message
from redis import Redis

from tasks.redis_keys import DUE
from worker.queue.envelope import unix_seconds

#: Messages that leave a set in one step where the worker takes as stock kombu does.
RELEASED_AT_ONCE = 100

#: For scripts: the unix seconds of a message's `eta`, nil where it has none of the usual form. Quotes within strings
#: are escaped, so nothing but a member of that name is found. It stands behind the body, which may have megabytes.
#: Someone who hides one elsewhere has his own job wait.
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

#: Moves messages from `unacked` into their sets; those that are no longer in `unacked` stay where they are.
#: KEYS: unacked, its index, then each message's set. ARGV: for each its tag, its time, the bytes that end its record
#: behind the message. HDEL comes first: a full server allows what follows a write that frees memory.
HOLD = """
for i = 3, #KEYS do
  local tag, time, ending = ARGV[3 * i - 8], ARGV[3 * i - 7], ARGV[3 * i - 6]
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
  end
end
return #KEYS - 2
"""


def hold_until_due(message: Message) -> bool:
    """Have Redis keep a checked message whose time has not come by the server's clock; False for one to run now.

    Call it while the message is being delivered. Kombu's own channel keeps nothing: there Celery does it.
    """
    headers, channel = message.headers, message.channel
    if headers.get("eta") is None or not hasattr(channel, "hold"):
        return False
    at = unix_seconds(headers["eta"])
    if at > channel.taken_at:
        # Celery ends a job that is revoked or has expired when it comes, even before its time.
        if headers["id"] in worker_state.revoked or unix_seconds(headers.get("expires")) < time.time():
            return False
        channel.hold(message.delivery_tag, at)
        return True
    # This worker's own clock may be behind: Celery would wait for it.
    del headers["eta"]
    return False


def release(channel: Any, queues: Iterable[str]) -> None:
    """Put all messages of some queues back to their lists, due or not: for a worker whose channel is kombu's own."""
    client, prefix = Redis(connection_pool=channel.pool), channel.global_keyprefix
    for queue, step in itertools.product(queues, channel.priority_steps):
        name = prefix + channel._q_for_pri(queue, step)
        while messages := client.zrange(f"{prefix}{DUE.named(name)}", 0, RELEASED_AT_ONCE - 1):
            with client.pipeline() as pipe:
                pipe.lpush(name, *messages)
                pipe.zrem(f"{prefix}{DUE.named(name)}", *messages)
                pipe.execute()
