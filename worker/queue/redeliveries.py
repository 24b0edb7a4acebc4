"""Which jobs kill their workers: a record in Redis that outlives every process.

A job whose whole worker died comes back after the visibility timeout, and would do so for ever if it is the reason. So
what comes back that way is counted, in the same step (worker/queue/transport.py): its holder died, froze or was cut
off. A message that says of itself that it was redelivered proves nothing, since anybody can write that; and what a
worker gives back in order is no death.

The hash `idefics:deliveries:<id>` in the broker's database has a job's returns, under the number of its retries: each
retry is a series of its own. A worker that dies takes along what it has not begun too. So of a job that came back, the
start in each later delivery is marked, before it is sent to the model process, under `<retries>:<return>`. A job that
never came back costs nothing here.

One death takes all jobs in flight along, so a count alone proves nothing: after two a job runs alone, and its innocent
neighbours end. Not counted are runs that the pool repeats after the death of the model process alone
(worker/pool/quarantine.py). The key goes when the job's message is acknowledged, else after its time to live.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

#: Followed by a job's id.
DELIVERIES = "idefics:deliveries:"
#: Seconds beyond the visibility timeout that such a record is kept: longer than a job waits for its next delivery.
KEPT_S = 7 * 86_400

#: Jobs that so many workers died with run alone.
ALONE_AFTER = 2

#: A job's id and its retries.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class History:
    """What is known of a job's earlier deliveries."""

    #: Deliveries that did not end.
    returns: int = 0
    #: Those of them in which it had been started, as far as is known: in the first one it counts as started.
    deaths: int = 0


class Deliveries:
    """Used by Celery's parent process. Where Redis does not answer, jobs run uncounted: a count is not worth a job."""

    def __init__(self, *, most: int) -> None:
        """`most`: deaths after which a job is not started any more."""
        self._most = most
        #: Kombu's, of the consumer; it changes with each connection.
        self.channel: Any = None

    def history(self, key: Key) -> History:
        id, retries = key
        try:
            record = self._client().hgetall(self._name(id))
        except Exception as error:
            logger.warning("The deliveries of job %s are unknown (%s): it runs.", ascii(id), error)
            return History()
        returns = int(record.get(str(retries).encode(), 0))
        started = sum(f"{retries}:{number}".encode() in record for number in range(1, returns))
        return History(returns, min(returns, 1) + started)

    def is_lost(self, deaths: int) -> bool:
        return deaths >= self._most

    def is_suspect(self, deaths: int) -> bool:
        """It is to run alone: always so before it is given up."""
        return deaths >= min(ALONE_AFTER, self._most - 1)

    def mark_started(self, jobs: Iterable[tuple[Key, int]]) -> None:
        """Note that jobs which came back so often start."""
        self._write([("hset", self._name(id), f"{retries}:{returns}", 1) for (id, retries), returns in jobs])

    def unmark_started(self, jobs: Iterable[tuple[Key, int]]) -> None:
        """They are given back in order."""
        self._write([("hdel", self._name(id), f"{retries}:{returns}") for (id, retries), returns in jobs])

    def count_return(self, key: Key) -> None:
        """Note that a job which was begun goes back for want of an end."""
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
            logger.warning("The deliveries of jobs are not counted: %s", error)

    def _name(self, id: str) -> str:
        return self.channel.global_keyprefix + DELIVERIES + id if self.channel is not None else ""

    def _client(self) -> Redis:
        if self.channel is None:
            raise RedisError("no connection yet")
        # Kombu's own client would prefix the keys of some commands only.
        return Redis(connection_pool=self.channel.pool)


def kept_s(channel: Any) -> int:
    return int(channel.visibility_timeout) + KEPT_S
