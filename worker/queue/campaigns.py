"""What users want of campaigns: a worker holds back the jobs of a paused one, and ends those of a canceled one.

A job names its campaign in a header (tasks/steering.py); jobs without one cost nothing here. A paused campaign's job is
sent again with a countdown before it begins, so it waits in Redis (worker/queue/due.py) and takes no place from others.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from celery import Celery

from tasks.outbox import connect
from tasks.redis_keys import broker_prefix
from tasks.steering import READ_S, Wanted, read_wanted
from worker.runtime import gil

logger = logging.getLogger(__name__)

#: Bounds in seconds of the countdown of a paused campaign's job. It grows with the pause, and differs from job to job:
#: the least is half of the most.
MIN_COUNTDOWN_S, MAX_COUNTDOWN_S = 5.0, 30.0
#: Campaigns that are remembered; a producer may name any number.
MAX_KNOWN = 1_000

Reader = Callable[[Sequence[str]], dict[str, Wanted]]


def held_back_s(paused_s: float) -> float:
    """The countdown of a job whose campaign has been paused for `paused_s` seconds."""
    most = min(max(paused_s, 2 * MIN_COUNTDOWN_S), MAX_COUNTDOWN_S)
    return random.uniform(most / 2, most)  # noqa: S311 - spreads the jobs


def reader(app: Celery) -> Reader:
    """Reads what is wanted of campaigns from an app's broker, to which it connects when it is first used."""
    clients: list[object] = []

    def read(campaigns: Sequence[str]) -> dict[str, Wanted]:
        if not campaigns:
            return {}
        if not clients:
            clients.append(connect(app))
        return read_wanted(clients[0], broker_prefix(app), campaigns)

    return read


class CampaignStates:
    """What is wanted of campaigns, read at most once in READ_S seconds for each. Thread-safe."""

    def __init__(self, read: Reader, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        #: With the time of the reading.
        self._known: dict[str, tuple[float, Wanted]] = {}
        self._fails = False

    def wanted(self, campaign: str) -> Wanted:
        """What is wanted of a campaign. If Redis does not answer: what was wanted last, or else that it runs."""
        known = self._fresh(campaign)
        if known is not None:
            return known
        # One thread reads, and the others wait for it: a worker that has not seen the campaign must not begin its jobs.
        with gil.released(), self._lock:
            return self._fresh(campaign) or self._read_again(campaign)

    def _fresh(self, campaign: str) -> Wanted | None:
        read_at, wanted = self._known.get(campaign, (float("-inf"), None))
        return wanted if self._clock() - read_at < READ_S else None

    def _read_again(self, campaign: str) -> Wanted:
        try:
            wanted = self._read([campaign])[campaign]
            self._fails = False
        except Exception as error:
            if not self._fails:
                logger.warning("What is wanted of campaigns cannot be read (%s): their jobs go on as before.", error)
            self._fails = True
            wanted = self._known.get(campaign, (0.0, Wanted()))[1]
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[campaign] = self._clock(), wanted
        return wanted
