"""What users want of campaigns: a worker holds back the jobs of a paused one, and ends those of a canceled one.

A job names its campaign in a header (tasks/steering.py); jobs without one cost nothing here. A paused campaign's job
waits in Redis (worker/queue/due.py), takes no place from others, and comes back after some seconds, to wait again or to
begin. Both processes see to it:

- The parent moves a job into the set of those before their time as soon as it is delivered, which costs little. It
  knows only the campaigns that it has polled, since its event loop must not wait for Redis. It remembers such jobs, and
  makes them due as soon as their campaign goes on or is canceled.
- The model process reads what is wanted just before a job begins, and sends the job again with a countdown: a short
  one, since by then the parent knows the campaign.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Celery
from kombu.message import Message

from tasks.outbox import connect
from tasks.payloads import PAYLOADS
from tasks.redis_keys import broker_prefix
from tasks.steering import MAX_HELD_BACK_S, READ_S, Wanted, campaign_of, read_wanted
from worker.observability.metrics import RETRIES
from worker.queue.cancellation import CancellationPoller
from worker.queue.due import DueJob, ends_when_delivered
from worker.runtime import gil

logger = logging.getLogger(__name__)

#: Bounds in seconds of the countdown of a paused campaign's job. It grows with the pause, and differs from job to job:
#: the least is half of the most.
MIN_COUNTDOWN_S, MAX_COUNTDOWN_S = 5.0, MAX_HELD_BACK_S
#: The same of a job that the model process sends again.
MIN_RESENT_S, MAX_RESENT_S = 1.0, 2.0
#: Campaigns that are remembered, since a producer may name any number, and jobs that the parent remembers.
MAX_KNOWN, MAX_HELD = 1_000, 10_000
#: Seconds that the parent polls a campaign after its last job: longer than a job is held back.
WATCH_S = 2 * MAX_COUNTDOWN_S

Reader = Callable[[Sequence[str]], dict[str, Wanted]]


def held_back_s(paused_s: float) -> float:
    """The countdown of a job whose campaign has been paused for `paused_s` seconds."""
    most = min(max(paused_s, 2 * MIN_COUNTDOWN_S), MAX_COUNTDOWN_S)
    return random.uniform(most / 2, most)  # noqa: S311 - spreads the jobs


def resent_after_s(paused_s: float, deadline_s: float | None) -> float:
    """The same for a job that the model process sends again. Those with a deadline are never left to the parent."""
    return held_back_s(paused_s) if deadline_s else random.uniform(MIN_RESENT_S, MAX_RESENT_S)  # noqa: S311 - spread


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


class CampaignWatch:
    """What is wanted of the campaigns whose jobs this worker gets, at most about a second old. Never waits for Redis.

    For the parent's event loop alone.
    """

    def __init__(self, read: Reader, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._poller: CancellationPoller[tuple[str, Wanted]] = CancellationPoller(
            lambda ids: set(read(tuple(ids)).items()), READ_S
        )
        #: When each campaign was last asked for.
        self._asked_at: dict[str, float] = {}
        self._known: dict[str, Wanted] = {}
        #: Jobs that this worker has moved to those before their time, with their campaigns: the newest.
        self._held: deque[tuple[str, DueJob]] = deque(maxlen=MAX_HELD)
        #: Those of them whose campaign is no longer paused.
        self._freed: deque[DueJob] = deque()

    def start(self) -> None:
        """Start polling, until the process ends."""
        self._poller.start()

    def wanted(self, campaign: str) -> Wanted:
        """What is wanted of a campaign; that it runs, while that is not known. It is polled from now on."""
        if campaign in self._asked_at or len(self._asked_at) < MAX_KNOWN:
            self._asked_at[campaign] = self._clock()
        return self._known.get(campaign, Wanted())

    def refresh(self) -> None:
        """Take over what the last poll found, and forget campaigns without jobs. To be called at least every second."""
        now = self._clock()
        self._asked_at = {id: at for id, at in self._asked_at.items() if now - at < WATCH_S}
        paused = self._paused()
        self._known |= self._poller.exchange(self._asked_at)
        if freed := paused - self._paused():
            self._freed += [job for campaign, job in self._held if campaign in freed]
            self._held = deque((each for each in self._held if each[0] not in freed), MAX_HELD)
        self._known = {id: wanted for id, wanted in self._known.items() if id in self._asked_at}

    def _paused(self) -> set[str]:
        return {id for id, wanted in self._known.items() if wanted.state == "paused"}

    def remember(self, campaign: str, job: DueJob) -> None:
        """Remember a paused campaign's job, which waits for its time."""
        self._held.append((campaign, job))

    def freed(self, most: int) -> list[DueJob]:
        """Some jobs that need not wait any longer, each once. Many have left their sets meanwhile."""
        return [self._freed.popleft() for _ in range(min(most, len(self._freed)))]


def hold_back(message: Message, arguments: Mapping[str, Any], watch: CampaignWatch) -> bool:
    """Have Redis keep a checked message for some seconds if its campaign is paused. False for a job that goes on.

    To be called while the message is being delivered. Jobs with a deadline go on: the model process ends those whose
    deadline has passed.
    """
    headers, channel = message.headers, message.channel
    campaign = campaign_of(headers)
    wanted = watch.wanted(campaign) if campaign else Wanted()
    if campaign is None or wanted.state != "paused" or arguments.get("deadline_s") or headers["task"] not in PAYLOADS:
        return False
    if not hasattr(channel, "delay") or ends_when_delivered(headers):
        return False
    due = channel.taken_at + held_back_s(time.time() - wanted.since)
    watch.remember(campaign, channel.delay(message.delivery_tag, due, headers["id"]))
    RETRIES.labels(headers["task"], "").inc()
    return True
