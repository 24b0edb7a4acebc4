"""A campaign's control record in Redis: its producer reports how far it is, and reads what its users want.

Everybody on the broker sees the record and steers by it (`idefics-jobs campaigns`, tasks/campaign/directory.py). The
workers read what is wanted too (tasks/steering.py), by the header in each of the campaign's messages.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import ConfigurationError, from_broker
from ..outbox import connect
from ..protocol import CAMPAIGN
from ..redis_keys import CAMPAIGN_ABOUT, CAMPAIGN_INDEX, CAMPAIGN_WANTED, broker_prefix
from ..setup_check import registry
from ..steering import READ_S, State, Wanted, read_wanted, server_time
from .record import MAX_CAMPAIGNS, TTL_S, CampaignInfo, CampaignProgress, about_mapping, progress_mapping, public_id

__all__ = ["CampaignControl", "CampaignInfo", "CampaignProgress", "State"]

#: Seconds between two reports, and before the next call if Redis does not answer.
REPORT_S, TROUBLE_PAUSE_S = 2.0, 10.0

T = TypeVar("T")


class CampaignControl:
    """The producer's side. For one thread at a time.

    No method raises: a campaign goes on without its record. `trouble` says why it cannot be seen or steered.
    """

    def __init__(self, app: Celery, id: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`id`: the campaign's own id, which stays secret: the ids of its jobs are made from it."""
        self._app = app
        #: The id under which others see it.
        self.id = public_id(id)
        self._clock = clock
        self._redis: Any = None
        self._wanted = Wanted()
        self._read_at = self._reported_at = self._silent_until = float("-inf")
        #: Why the last call failed, a sentence; empty if it did not.
        self.trouble = ""

    @property
    def headers(self) -> dict[str, str]:
        """For each of its jobs: the option `headers` of `Client.submit`."""
        return {CAMPAIGN: self.id}

    def register(self, info: CampaignInfo) -> None:
        """Enter the campaign, at each start of its producer. If it was canceled, it is to run again: waits until no
        worker has the earlier state any more."""
        if self._attempt(lambda redis: self._register(redis, info)):
            time.sleep(2 * READ_S)

    def report(self, progress: CampaignProgress) -> None:
        """Report how far it is, if the last report is REPORT_S old. To be called often."""
        if self._clock() - self._reported_at >= REPORT_S:
            self._reported_at = self._clock()
            self._attempt(lambda redis: self._write(redis, progress_mapping(progress)))

    def end(self, how: Literal["finished", "stopped", "canceled"], progress: CampaignProgress) -> None:
        """Report that the producer ends."""
        self._attempt(lambda redis: self._write(redis, {**progress_mapping(progress), "ended": how}))

    def state(self) -> State:
        """What users want of it: one command each READ_S at most; the last known state while Redis does not answer."""
        if self._clock() - self._read_at >= READ_S:
            self._read_at = self._clock()
            found = self._attempt(lambda redis: read_wanted(redis, broker_prefix(self._app), [self.id])[self.id])
            self._wanted = found or self._wanted
        return self._wanted.state

    def _register(self, redis: Any, info: CampaignInfo) -> bool:
        """Whether the campaign was canceled before."""
        was_canceled = read_wanted(redis, broker_prefix(self._app), [self.id])[self.id].state == "canceled"
        if was_canceled:
            redis.delete(self._key(CAMPAIGN_WANTED.named(self.id)))
        self._write(redis, {**about_mapping(info), "ended": ""})
        return was_canceled

    def _write(self, redis: Any, fields: dict[str, str | float]) -> None:
        now = server_time(redis)
        about, wanted = self._key(CAMPAIGN_ABOUT.named(self.id)), self._key(CAMPAIGN_WANTED.named(self.id))
        index = self._key(CAMPAIGN_INDEX.named())
        with redis.pipeline() as pipe:
            pipe.hset(about, mapping={**fields, "seen": now})
            pipe.zadd(index, {self.id: now})
            pipe.zremrangebyrank(index, 0, -MAX_CAMPAIGNS - 1)
            for key in (about, wanted, index):
                pipe.expire(key, TTL_S)
            pipe.execute()

    def _key(self, name: str) -> str:
        return broker_prefix(self._app) + name

    def _attempt(self, call: Callable[[Any], T]) -> T | None:
        """The call's value; None if Redis does not answer or refuses, and for TROUBLE_PAUSE_S afterwards."""
        if self._clock() < self._silent_until:
            return None
        try:
            if self._redis is None:
                with registry(self._app):
                    self._redis = connect(self._app)
            value = call(self._redis)
        except (RedisError, OperationalError, OSError, ConfigurationError) as error:
            self.trouble = f"Others cannot see or steer this campaign: {from_broker(error)}"
            self._silent_until = self._clock() + TROUBLE_PAUSE_S
            return None
        self.trouble = ""
        return value


def this_host() -> str:
    """This machine's name, for CampaignInfo."""
    return socket.gethostname()
