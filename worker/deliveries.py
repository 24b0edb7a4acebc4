"""Which jobs kill their workers: a count in Redis that outlives every process.

A job whose whole worker died comes back after the visibility timeout, marked as redelivered, and would do so for ever
if it is the reason. So each start of a redelivered job is counted, when it is sent to the model process, in the hash
`idefics:deliveries:<id>` of the results' Redis, with Celery's retries as the field: each retry is a series of its own.
The first delivery needs no count: a redelivered job had one. So a job that is delivered once costs nothing here.

Not counted are runs that the pool repeats after the death of the model process alone (worker/pool/quarantine.py), and
messages that come again while their job still runs. What a worker gives back when it is stopped in order is taken off.

One death takes all jobs in flight along, so a count alone proves nothing: from the third delivery on a job runs alone,
and its innocent neighbours end. The key goes with the job's end (worker/results.py), else after its time to live.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from redis import Redis

from worker.results import DELIVERIES

logger = logging.getLogger(__name__)

#: Jobs started so often before run alone.
ALONE_AFTER = 2

#: A job's id and its retries.
Key = tuple[str, int]


class Deliveries:
    """Used by Celery's parent process. Where Redis does not answer, jobs run uncounted: a count is not worth a job."""

    def __init__(self, client: Callable[[], Redis], *, most: int, ttl_s: int) -> None:
        """`most`: starts after which a job is not started any more. `ttl_s` is longer than a delivery can take."""
        self._client = client
        self._most = most
        self._ttl_s = ttl_s

    def earlier(self, key: Key) -> int:
        """How often a redelivered job was started before."""
        id, retries = key
        try:
            return 1 + int(self._client().hget(DELIVERIES + id, str(retries)) or 0)
        except Exception as error:
            logger.warning("The deliveries of job %s are unknown (%s): it runs.", ascii(id), error)
            return 1

    def is_lost(self, earlier: int) -> bool:
        return earlier >= self._most

    def is_suspect(self, earlier: int) -> bool:
        """It is to run alone: always so before it is given up."""
        return earlier >= min(ALONE_AFTER, self._most - 1)

    def count(self, keys: Iterable[Key], by: int = 1) -> None:
        """Note starts; `by=-1` takes them off again."""
        commands = [(DELIVERIES + id, str(retries)) for id, retries in keys]
        if not commands:
            return
        try:
            with self._client().pipeline(transaction=False) as pipe:
                for name, field in commands:
                    pipe.hincrby(name, field, by)
                    pipe.expire(name, self._ttl_s)
                pipe.execute()
        except Exception as error:
            logger.warning("The deliveries of %d jobs are not counted: %s", len(commands), error)
