"""Slots of a host that all workers of one broker share, leased in Redis.

A worker leases as many slots of a host as it needs, at once for all its threads, and renews the lease twice a second:
a download costs no call to Redis, except the first one from a host. If the workers need more slots than a host has,
each gets an even share of them. A worker that dies loses its slots when its lease expires.

While Redis is away, each worker keeps to its own limit alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kombu.utils.uuid import uuid
from redis import Redis

from tasks.redis_keys import HOST_SLOTS

#: Seconds that a lease lasts without a renewal.
LEASE_S = 5.0
#: Seconds for which a slot is leased to one worker, if more workers need slots than a host has.
TURN_S = 5.0

#: KEYS: a host's hash, with a field for each worker: the time when its lease ends, its slots, and how many it wants.
#: The field `closed` has the time until which the host asked to be left alone. ARGV: this worker, its downloads under
#: way, the slots that it wants, all slots, milliseconds that a lease lasts, those for which the host asked now, and
#: those of a turn. Returns this worker's slots, whether workers lack slots, and milliseconds until the host is open.
#: Downloads under way keep their slots: the others get them once they have ended.
LEASE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, used, wanted, total = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local held, closed, lacks, workers, wants = 0, now + ARGV[6], 0, {}, {}
local function note(worker, want)
  if want > 0 then
    workers[#workers + 1], wants[#wants + 1] = worker, want
  end
end
local told = redis.call('HGETALL', KEYS[1])
for i = 1, #told, 2 do
  local ends, slots, want = string.match(told[i + 1], '^(%d+) (%d+) (%d+)$')
  if told[i] == 'closed' then
    closed = math.max(closed, tonumber(told[i + 1]))
  elseif not ends or tonumber(ends) < now then
    redis.call('HDEL', KEYS[1], told[i])
  elseif told[i] ~= me then
    held = held + slots
    note(told[i], tonumber(want))
    if tonumber(want) > tonumber(slots) then lacks = 1 end
  end
end
note(me, wanted)
local slots = wanted
if #workers > total then
  table.sort(workers)
  local first = math.floor(now / ARGV[7]) * total % #workers
  for i, worker in ipairs(workers) do
    if worker == me and (i - 1 - first) % #workers >= total then slots = 0 end
  end
  slots = math.min(slots, 1)
else
  table.sort(wants)
  local left = total
  for i, want in ipairs(wants) do
    local even = left / (#wants - i + 1)
    if want > even then
      slots = math.min(slots, math.ceil(even))
      break
    end
    left = left - want
  end
end
slots = math.max(0, math.min(slots, total - held))
if slots < wanted then lacks = 1 end
if wanted + used > 0 then
  redis.call('HSET', KEYS[1], me, string.format('%d %d %d', now + ARGV[5], math.max(slots, used), wanted))
else
  redis.call('HDEL', KEYS[1], me)
end
if closed > now then
  redis.call('HSET', KEYS[1], 'closed', string.format('%d', closed))
else
  redis.call('HDEL', KEYS[1], 'closed')
end
redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[5]), closed - now))
return {slots, lacks, math.max(0, closed - now)}
"""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a worker needs of one host."""

    host: str
    #: Downloads under way.
    used: int
    #: Slots; 0 gives the lease up.
    wanted: int
    #: Seconds for which the host has asked to be left alone, since the last request.
    closed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """What a worker got of one host."""

    slots: int
    #: Whether workers lack slots: then they renew their leases more often.
    is_contended: bool = False
    #: Seconds until the host may be asked again.
    closed_s: float = 0.0


class HostLeases:
    """Leases slots in the broker's Redis. Used by one thread."""

    def __init__(self, connect: Callable[[], tuple[Redis, str]], total: int) -> None:
        """`connect` returns a client and the prefix of all keys. `total`: slots of each host."""
        self._connect = connect
        self._total = total
        self._client: tuple[Redis, str] | None = None
        self._me = uuid()

    def exchange(self, requests: Sequence[LeaseRequest]) -> list[Lease]:
        """Renew this worker's leases. Raises what the client raises."""
        self._client = self._client or self._connect()
        client, prefix = self._client
        try:
            with client.pipeline(transaction=False) as pipe:
                for request in requests:
                    pipe.eval(LEASE, 1, prefix + key_of(request.host), *self._arguments(request))
                replies: list[Any] = pipe.execute()
        except Exception:
            # A fail-over may have led to another server.
            self._client = None
            raise
        return [Lease(slots, bool(lacks), closed_ms / 1000) for slots, lacks, closed_ms in replies]

    def _arguments(self, request: LeaseRequest) -> tuple[Any, ...]:
        lease_ms, closed_ms, turn_ms = int(1000 * LEASE_S), int(1000 * request.closed_s), int(1000 * TURN_S)
        return self._me, request.used, request.wanted, self._total, lease_ms, closed_ms, turn_ms


def key_of(host: str) -> str:
    """The key of a host's leases. Hashed, since producers choose hosts: of one length, and of no other form."""
    return HOST_SLOTS.named(hashlib.blake2b(host.encode(errors="replace"), digest_size=16).hexdigest())
