"""Load balancing: jobs that would end late in a slow worker go to the other workers of its queue.

A worker prefetches jobs, so that its batches are full and images load meanwhile. At the end of a bulk, a slow worker
would keep its prefetched jobs while the others are idle, although they would end these jobs long before. So workers
that share a queue exchange their loads in the hash `idefics:load:<queue>` of the broker's database. It has a field for
each worker, with a time of the server's clock; old fields are deleted, and the key expires in seconds. Idle workers
write only while another worker is busy.

From these loads each worker decides for itself (worker/queue/load_estimates.py) whether it takes more jobs, and how
many of its jobs that have not begun it puts back (worker/pool/load_sharing.py). A queue's only worker does neither.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import bootsteps
from kombu.utils.uuid import uuid
from redis import Redis

from tasks.redis_keys import LOAD
from worker.queue.load_estimates import Load, idle, leaves_to_others, surplus
from worker.queue.transport import Channel

logger = logging.getLogger(__name__)

#: Seconds between two exchanges.
PERIOD_S = 0.05
#: Seconds for which a report of the event loop, or a load of another worker, counts.
FRESH_S = 0.5
#: Seconds without exchanges after one failed.
REST_S = 2.0
#: A worker leaves jobs to others for MAX_LEAVE_S seconds at most, or for the time of MAX_LEAVE_JOBS jobs if that
#: is longer. Then it takes all jobs for TAKE_ALL_S seconds.
MAX_LEAVE_JOBS, MAX_LEAVE_S, TAKE_ALL_S = 2, 1.0, 5.0

#: KEYS: the hash, the queue's lists. ARGV: this worker, its load, whether it is busy, milliseconds that a load counts.
#: Returns how many jobs are queued, and the others' loads.
EXCHANGE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply, told = {0}, redis.call('HGETALL', KEYS[1])
local is_busy = ARGV[3] == '1'
for i = 1, #told, 2 do
  local at, busy, load = string.match(told[i + 1], '^(%d+) (%d) (.*)$')
  if not at or math.abs(now - at) > tonumber(ARGV[4]) then
    redis.call('HDEL', KEYS[1], told[i])
  elseif told[i] ~= ARGV[1] then
    is_busy = is_busy or busy == '1'
    reply[#reply + 1] = load
  end
end
if is_busy then
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %s %s', now, ARGV[3], ARGV[2]))
  redis.call('PEXPIRE', KEYS[1], 10 * ARGV[4])
end
for i = 2, #KEYS do reply[1] = reply[1] + redis.call('LLEN', KEYS[i]) end
return reply
"""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A worker's state at time.monotonic() `at`."""

    load: Load
    is_busy: bool
    #: By each queue that it takes from, the queue's lists.
    queues: Mapping[str, Sequence[str]]
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """One queue's jobs and its other workers' loads, at time.monotonic() `at`."""

    queued: int
    others: Sequence[Load]
    at: float = field(default_factory=time.monotonic)


class LoadExchange:
    """Exchanges loads in a thread: the event loop must not wait for a Redis that is slow or away."""

    def __init__(self, connect: Callable[[], tuple[Redis, str]]) -> None:
        """`connect` returns a client and the prefix of all keys."""
        self.report: LoadReport | None = None
        #: By queue.
        self.queue_loads: Mapping[str, QueueLoad] = {}
        self._connect = connect
        self._client: tuple[Redis, str] | None = None
        self._me = uuid()

    def start(self) -> None:
        threading.Thread(target=self._loop, name="balance", daemon=True).start()

    def _loop(self) -> None:
        while True:
            time.sleep(self._pause())

    def _pause(self) -> float:
        report = self.report
        try:
            # While the event loop is blocked, this worker begins no jobs: it must not attract any.
            if report is not None and time.monotonic() - report.at < FRESH_S:
                self.queue_loads = self.exchange(report)
            return PERIOD_S
        except Exception as error:
            # Each worker then keeps what it has.
            logger.debug("The workers' loads cannot be exchanged: %s", error)
            self._client = None
            return REST_S

    def exchange(self, report: LoadReport) -> Mapping[str, QueueLoad]:
        """Write this worker's load, and read the others'. Raises what the client raises."""
        self._client = self._client or self._connect()
        client, prefix = self._client
        load, is_busy = report.load, int(report.is_busy)
        # Workers of an earlier version take 2 for closed.
        is_open = 2 if load.is_open and load.has_parked else int(load.is_open)
        told = f"{load.width:.2f} {load.job_s:.4f} {load.unbegun} {is_open}"
        with client.pipeline(transaction=False) as pipe:
            for queue, lists in report.queues.items():
                keys = [prefix + key for key in (LOAD.named(queue), *lists)]
                pipe.eval(EXCHANGE, len(keys), *keys, self._me, told, is_busy, int(1000 * FRESH_S))
            replies = pipe.execute()
        return {
            queue: QueueLoad(queued, [_load(each) for each in others])
            for queue, (queued, *others) in zip(report.queues, replies, strict=True)
        }


def _load(told: bytes) -> Load:
    width, job_s, unbegun, is_open = told.split()
    return Load(float(width), float(job_s), int(unbegun), is_open in (b"1", b"2"), has_parked=is_open == b"2")


class LeaveLimit:
    """Limits how long jobs stay in the queue because this worker leaves them to others, which may never take them."""

    def __init__(self) -> None:
        self._since = float("inf")
        self._takes_all_until = float("-inf")

    def still_leaves(self, *, leaves: bool, queued: int, job_s: float, now: float) -> bool:
        """Whether this worker still leaves jobs to others. `leaves`: whether it would by the loads."""
        if not leaves or not queued:
            self._since = float("inf")
        else:
            self._since = min(self._since, now)
        if now - self._since > max(MAX_LEAVE_S, MAX_LEAVE_JOBS * job_s):
            self._takes_all_until, self._since = now + TAKE_ALL_S, float("inf")
        return leaves and now >= self._takes_all_until


class LoadBalancing(bootsteps.StartStopStep):  # type: ignore[misc]
    """Compares the loads in the parent's event loop, and has the pool leave or return jobs."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        self._worker = worker
        self._leave_limit = LeaveLimit()
        self._exchange = LoadExchange(self._connect)
        self._exchange.start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Called at every reconnect to the broker, with an empty event loop."""
        hub.call_repeatedly(PERIOD_S, self._balance)

    def _connect(self) -> tuple[Redis, str]:
        # A reference is kept, since the client uses its pool.
        self._connection = self._worker.app.connection_for_write()
        channel = self._connection.default_channel
        # Not the channel's own client, which puts the prefix before the keys of some commands.
        return Redis(connection_pool=channel.pool), channel.global_keyprefix

    def _balance(self) -> None:
        pool, consumer = self._worker.pool, self._worker.consumer.task_consumer
        channel = consumer and consumer.channel
        if not isinstance(channel, Channel):
            # Kombu's own (IDEFICS_ATOMIC_RESERVE=false) cannot put a message back as it came.
            return
        lists = {
            queue: [channel._q_for_pri(queue, step) for step in channel.priority_steps]
            # Not those of a queue that is no longer consumed: its jobs do not come here.
            for queue in set(channel.record_endings).intersection(channel.active_queues)
        }
        load: Load = pool.load
        self._exchange.report = LoadReport(load, load.unbegun > -load.width or load.has_parked, lists)
        known = {queue: each for queue, each in self._exchange.queue_loads.items() if self._is_fresh(each)}
        pool.leaves_to_others = self._leaves(load, known, len(lists))
        for queue, each in known.items():
            number = surplus(load, each.others, each.queued)
            if number:
                pool.give_back(queue, number)
            takers = idle(each.others, each.queued) if load.has_parked else 0
            if takers:
                pool.sharing.share_parked(queue, takers)

    @staticmethod
    def _is_fresh(each: QueueLoad) -> bool:
        return time.monotonic() - each.at < FRESH_S

    def _leaves(self, load: Load, known: Mapping[str, QueueLoad], queues: int) -> bool:
        leaves = len(known) == queues > 0 and all(
            leaves_to_others(load, each.others, each.queued) for each in known.values()
        )
        queued = sum(each.queued for each in known.values())
        return self._leave_limit.still_leaves(leaves=leaves, queued=queued, job_s=load.job_s, now=time.monotonic())
