"""The atomic reserve (reliable fetch): one Lua script moves a message from its queue's list into `unacked`.

If a worker dies, the message is always in one of the two. This module has the script, its request and its reply,
without I/O; worker/queue/transport.py sends the one and reads the other.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from tasks.redis_keys import DUE, DUE_IDS, list_name
from worker.queue.due import ETA, ID
from worker.queue.envelope import MAX_DELAY_S

#: Messages before their time, and their bytes, that one call of the script moves: a long script blocks Redis.
MAX_DELAYED = 100
MAX_DELAYED_BYTES = 1_000_000

#: KEYS: unacked, its index, then the lists in order. ARGV: the tag, the prefix of a list's name in the name of its set
#: of messages that wait for their time (worker/queue/due.py), the key of their ids, then for each list the end of its
#: messages' records; empty for a list without acknowledgements. Returns the list's number, the message and the server's
#: time; number -1 if it moved that many messages before their time and must be called again.
#: RPOP or ZREM comes first: a full server allows what follows a write that frees memory. Lua does not roll back.
#: All times are the server's: a worker's clock may be hours ahead.
RESERVE = f"""
{ETA}
{ID}
local ids = ARGV[3]
local function note(raw, due, at)
  local id = id_of(raw)
  if id and at then redis.pcall('ZADD', ids, at, id .. '\\n' .. due) end
  if id and not at then redis.pcall('ZREM', ids, id .. '\\n' .. due) end
end
local function failed(reply) return type(reply) == 'table' and reply.err end
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local met, bytes = 0, 0
for i = 3, #KEYS do
  local due, raw, at
  if ARGV[i + 1] ~= '' then
    due = ARGV[2] .. KEYS[i]
    local first = redis.pcall('ZRANGEBYSCORE', due, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 1)
    raw, at = first[1], first[2]
  end
  if raw then
    redis.call('ZREM', due, raw)
    note(raw, due)
  else
    raw = redis.call('RPOP', KEYS[i])
  end
  while due and raw and not at do
    local moment = eta(raw)
    if not moment or moment <= tonumber(now) or moment > time[1] + {MAX_DELAY_S} then break end
    local score = string.format('%.6f', moment + (time[2] + met) % 1000 / 1000000)
    local reply = redis.pcall('ZADD', due, score, raw)
    if failed(reply) then
      redis.call('RPUSH', KEYS[i], raw)
      return reply
    end
    note(raw, due, score)
    met, bytes = met + 1, bytes + #raw
    if met >= {MAX_DELAYED} or bytes >= {MAX_DELAYED_BYTES} then return {{-1, '', now}} end
    raw = redis.call('RPOP', KEYS[i])
  end
  if raw then
    if due and string.byte(raw) == 123 then
      local reply = redis.pcall('HSET', KEYS[1], ARGV[1], '[' .. raw .. ARGV[i + 1])
      if not failed(reply) then reply = redis.pcall('ZADD', KEYS[2], now, ARGV[1]) end
      if failed(reply) then
        redis.pcall('HDEL', KEYS[1], ARGV[1])
        if at then
          redis.call('ZADD', due, at, raw)
          note(raw, due, at)
        else
          redis.call('RPUSH', KEYS[i], raw)
        end
        return reply
      end
    end
    return {{i - 3, raw, now}}
  end
end
return false
"""
RESERVE_SHA = hashlib.sha1(RESERVE.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Reserved:
    """A message that the script has taken from its list."""

    #: Names it in `unacked`; None for a message that is not recorded there, and needs no acknowledgement.
    tag: str | None
    queue: str
    #: Where it was, without the prefix of all keys.
    list: str
    #: The end of its record.
    ending: str
    raw: bytes
    #: Unix seconds of the server's clock.
    at: float


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """A request for one message."""

    #: Names the message from the moment at which it leaves its queue.
    tag: str
    #: Of each list, in the order in which they are read.
    queues: tuple[str, ...]
    #: Without the prefix of all keys.
    lists: tuple[str, ...]
    #: Of each list, the end of its messages' records; empty for a list without acknowledgements.
    endings: tuple[str, ...]

    def arguments(self, record_keys: tuple[str, str], prefix: str) -> list[Any]:
        """The script's: number of keys, KEYS, ARGV. `prefix` stands before all keys of this deployment."""
        keys = [*record_keys, *(prefix + name for name in self.lists)]
        return [len(keys), *keys, self.tag, prefix + DUE.prefix, prefix + DUE_IDS.pattern, *self.endings]

    def reserved(self, reply: Any) -> Reserved | None:
        """The message in the script's reply; None where the script must be called again."""
        number, raw, now = reply
        if number < 0:
            return None
        ending = self.endings[number]
        is_recorded = bool(ending) and raw[:1] == b"{"
        tag = self.tag if is_recorded else None
        return Reserved(tag, self.queues[number], self.lists[number], ending, raw, float(now))


def reserve_request(
    queues: Iterable[str], steps: Iterable[int], separators: Iterable[str], endings: Mapping[str, str]
) -> ReserveRequest:
    """A request for the next message of some queues: by priority, then in the queues' order.

    `steps` are the priorities that have lists, `separators` stand before them in the lists' names; `endings` are those
    of each queue with acknowledgements.
    """
    owners, lists = _lists(tuple(queues), tuple(steps), tuple(separators))
    return ReserveRequest(uuid(), owners, lists, tuple([endings.get(queue, "") for queue in owners]))


@functools.lru_cache(256)
def _lists(
    queues: tuple[str, ...], steps: tuple[int, ...], separators: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Each list's queue, and its name. Cached: every request asks for the same few."""
    # At priority 0 the names are the same for all separators.
    lists = dict.fromkeys(
        (queue, list_name(queue, step, separator)) for step in steps for queue in queues for separator in separators
    )
    return tuple(queue for queue, _ in lists), tuple(name for _, name in lists)


def record_ending(queue: str) -> str:
    """The end of a queue's records: the default exchange and the queue's name, so a return needs no binding."""
    return f', "", {dumps(queue)}]'
