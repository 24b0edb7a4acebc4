"""Which jobs kill their workers: a record in Redis that outlives the processes.

A job whose worker died is delivered again after the visibility timeout. A job that kills its workers would be delivered
for ever. So each return of a job from a worker that died, froze or was cut off is counted, in the step that puts the
job back (worker/queue/visibility_timeout.py). The message's own flag `redelivered` proves nothing, since any producer
can set it; and a job that a worker requeues in order is not counted.

The hash `idefics:redeliveries:<id>` in the broker's database holds a job's returns, under the number of its retries:
each retry is counted apart. A worker that dies also returns jobs that it had not begun. So a job that was returned is
marked when it starts in a later delivery, before it is sent to the model process, under `<retries>:<return>`. A job
that was never returned has no record.

One death returns all jobs in flight, so a count alone proves nothing: after two deaths a job runs alone, and the other
jobs end. Runs that the pool repeats after the death of the model process alone are not counted
(worker/pool/quarantine.py). The key is deleted when the job's message is acknowledged, or expires.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from tasks.redis_keys import REDELIVERIES
from worker.observability.job_fields import job_extra

logger = logging.getLogger(__name__)

#: Seconds beyond the visibility timeout that a record is kept: longer than a job waits for its next delivery.
KEPT_S = 7 * 86_400

#: Deaths of workers after which a job runs alone.
ALONE_AFTER = 2

#: A job's id and its retries.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class History:
    """A job's earlier deliveries, as far as they are known."""

    #: Deliveries after which the job was returned.
    returns: int = 0
    #: Those of them in which it had started. In the first one it counts as started.
    deaths: int = 0


class RedeliveryCounter:
    """Counts redeliveries, in Celery's parent process. While Redis does not answer, jobs run uncounted."""

    def __init__(self, *, most: int) -> None:
        """`most`: deaths after which a job is no longer started."""
        self._most = most
        #: Kombu's channel of the consumer; it changes with each connection.
        self.channel: Any = None

    def history(self, key: Key) -> History:
        """A job's earlier deliveries; an empty history while Redis does not answer."""
        id, retries = key
        try:
            record = self._client().hgetall(self._name(id))
        except Exception as error:
            logger.warning("The redeliveries of job %s are unknown (%s): it runs.", id, error, extra=job_extra(id))
            return History()
        returns = int(record.get(str(retries).encode(), 0))
        started = sum(f"{retries}:{number}".encode() in record for number in range(1, returns))
        return History(returns, min(returns, 1) + started)

    def is_lost(self, deaths: int) -> bool:
        """Whether a job is given up."""
        return deaths >= self._most

    def is_suspect(self, deaths: int) -> bool:
        """Whether a job must run alone. Every job does so before it is given up."""
        return deaths >= min(ALONE_AFTER, self._most - 1)

    def mark_started(self, jobs: Iterable[tuple[Key, int]]) -> None:
        """Record that jobs start, each with the number of its returns."""
        self._write([("hset", self._name(id), f"{retries}:{returns}", 1) for (id, retries), returns in jobs])

    def unmark_started(self, jobs: Iterable[tuple[Key, int]]) -> None:
        """Forget their starts: they are requeued in order."""
        self._write([("hdel", self._name(id), f"{retries}:{returns}") for (id, retries), returns in jobs])

    def count_return(self, key: Key) -> None:
        """Count a return of a started job whose result could not be stored."""
        returns = self.history(key).returns
        name = self._name(key[0])
        self._write([("hset", name, f"{key[1]}:{returns}", 1), ("hincrby", name, str(key[1]), 1)])

    def _write(self, commands: list[tuple[Any, ...]]) -> None:
        if not commands or self.channel is None:
            return
        try:
            with self._client().pipeline(transaction=False) as pipe:
                for command, name, *arguments in commands:
                    getattr(pipe, command)(name, *arguments)
                    pipe.expire(name, kept_s(self.channel))
                pipe.execute()
        except Exception as error:
            logger.warning("Redeliveries are not counted: %s", error)

    def _name(self, id: str) -> str:
        return self.channel.global_keyprefix + REDELIVERIES.named(id) if self.channel is not None else ""

    def _client(self) -> Redis:
        if self.channel is None:
            raise RedisError("no connection yet")
        # Kombu's own client would prefix the keys of some commands only.
        return Redis(connection_pool=self.channel.pool)


def kept_s(channel: Any) -> int:
    """Seconds that a record is kept after its last write."""
    return int(channel.visibility_timeout) + KEPT_S
