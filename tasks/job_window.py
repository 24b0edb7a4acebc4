"""Keeps a bounded number of jobs in flight and collects their outcomes: the loop of batches and campaigns.

What a job is made from and what becomes of its outcome is the business of the `Work` (tasks/batch.py,
tasks/campaign/rows.py).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .bulk import JobSender, bulk_of
from .errors import IdeficsError, JobError, ModelNotFound, QueueFull, from_broker
from .outcomes import Outcome
from .payloads import Job
from .steering import MAX_HELD_BACK_S

#: Jobs in flight: enough for some workers with full batches.
WINDOW = 1_000
#: Bulk jobs run after all others.
PRIORITY = 9

#: Seconds between two polls of the results: the longer pause follows a poll without results.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 0.5
#: Seconds of submitting between two polls.
TURN_S = 0.25
#: Jobs end nearly in the order in which they were sent: a poll asks for the oldest, this part of a window, and after so
#: many seconds for all.
ASKED_PART, ASK_ALL_S = 0.2, 1.0
#: Seconds before a retry if Redis is away or the broker is full.
TROUBLE_PAUSE_S = 1.0
#: Seconds without any answer after which jobs that have neither started nor wait in the queue count as lost.
LOST_S = 600.0
#: The same if jobs of an earlier run are among them: their results may have expired, or were deleted when their answers
#: were written to an output that was cut later. A job that is sent again needlessly still ends once, by its id.
RESUMED_LOST_S = 10.0


class JobsLost(IdeficsError):
    """Jobs were sent and have neither an answer nor a place in the queue: Redis has lost them."""

    code = "jobs_lost"
    retryable = True
    http_status = 503
    public = {"": "Some of it was lost: try again later."}

    def __init__(self, jobs: int) -> None:
        super().__init__(f"{jobs} jobs have neither an answer nor a place in the queue: Redis has lost them.")


class Item(Protocol):
    """What one job is made from."""

    def job(self) -> Job:
        """Its job. Raises a JobError if it is refused."""

    def without_payload(self) -> Any:
        """The item as it is kept while its job is in flight: as small as may be."""


ItemT = TypeVar("ItemT", bound=Item)
AnswerT = TypeVar("AnswerT")
AnswerT_co = TypeVar("AnswerT_co", covariant=True)


class Work(Protocol[ItemT, AnswerT_co]):
    """Items, how their jobs are sent, and what becomes of outcomes."""

    def items(self) -> Iterator[ItemT | None]:
        """The items in order; None for a part of the input that needs no job."""

    def job_id(self, item: ItemT) -> str:
        """The id of an item's job: always the same, so that its result is found again."""

    def was_sent(self, item: ItemT) -> bool:
        """Whether an earlier run has sent its job: then only its result is asked for."""

    def submit(self, sender: JobSender, item: ItemT, job: Job, priority: int, id: str) -> None:
        """Submit an item's job to `sender`, the client's. Raises a JobError or ModelNotFound if it is refused."""

    def note_sent(self, item: ItemT) -> None:
        """The jobs of this item and of those before it were sent, or refused and their answers given."""

    def answer(self, item: ItemT, outcome: Outcome | ModelNotFound, id: str) -> AnswerT_co:
        """What an outcome becomes. Raises ModelNotFound if no job at all can be sent."""

    def queued(self, items: Iterable[ItemT], priority: int) -> int:
        """Jobs with this priority that wait in the queues of these items' jobs."""


class JobWindow(Generic[ItemT, AnswerT]):
    """One pass over the items. Waits while Redis is away or the broker is full."""

    def __init__(
        self,
        client: Any,
        work: Work[ItemT, AnswerT],
        *,
        window: int = WINDOW,
        priority: int = PRIORITY,
        keep_results: bool = False,
    ) -> None:
        self._client = client
        self._work = work
        self._items = work.items()
        self._window = window
        self._priority = priority
        self._keep_results = keep_results
        #: Items whose jobs must be sent, in order, with these and their ids. Few: those of one round trip.
        self._unsent: deque[tuple[str, ItemT, Job]] = deque()
        self._is_read = False
        self._flying: dict[str, ItemT] = {}
        #: Ids of jobs that an earlier run sent.
        self._resumed: set[str] = set()
        self._last_news = time.monotonic()
        self._asked_all_at = float("-inf")
        #: Why it waits; empty if it does not.
        self.trouble = ""
        #: Ends after this turn, without waiting for jobs in flight.
        self.is_stopped = False
        #: Sends nothing more, and ends when no job is in flight.
        self.is_draining = False
        #: Sends nothing for now.
        self.is_paused = False

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    @property
    def is_complete(self) -> bool:
        """Whether all items have their answers."""
        return self._is_read and not self._unsent and not self._flying

    def turns(self) -> Iterator[list[AnswerT]]:
        """The answers of each turn, often none. Their results are deleted at the next turn. Raises JobsLost."""
        pause = FIRST_PAUSE_S
        while not self._has_ended():
            answers: list[AnswerT] = []
            ended: list[str] = []
            try:
                self._fill(answers)
                ended = self._collect(answers)
                self.trouble = ""
            except QueueFull as error:
                self.trouble = str(error)
                ended = self._patiently(self._collect, answers) or []
            except (RedisConnectionError, RedisTimeoutError, OperationalError) as error:
                self.trouble = str(from_broker(error))
            yield answers
            if ended and not self._keep_results:
                self._forget(ended)
            if answers or self.trouble or self.is_paused:
                # Workers hold the jobs back while it is paused, and for a while longer: they are in no queue.
                self._last_news = time.monotonic() + (MAX_HELD_BACK_S if self.is_paused else 0)
            pause = FIRST_PAUSE_S if answers else min(pause * 1.5, LAST_PAUSE_S)
            if not self._can_send or self.trouble or self.in_flight >= self._window:
                self._check_for_lost_jobs()
                time.sleep(TROUBLE_PAUSE_S if self.trouble else pause)

    def _has_ended(self) -> bool:
        return self.is_stopped or self.is_complete or (self.is_draining and not self._flying)

    @property
    def _can_send(self) -> bool:
        return not (self._is_read or self.is_draining or self.is_paused)

    def _fill(self, answers: list[AnswerT]) -> None:
        """Send jobs until the window is full."""
        if self.is_draining or self.is_paused:
            return
        refusal: JobError | ModelNotFound | None = None
        with bulk_of(self._client, self._note_sent) as bulk:
            for id, item, job in self._to_send(answers):
                try:
                    self._work.submit(bulk, item, job, self._priority, id)
                except (JobError, ModelNotFound) as fault:
                    # Too large, with a callback that may not be called, or for a model that no worker serves. Its
                    # answer must be written before a later job is sent.
                    refusal = fault
                    break
        if refusal is not None:
            # All before it were sent.
            id, item, _ = self._unsent.popleft()
            answers.append(self._work.answer(item, refusal, id))

    def _to_send(self, answers: list[AnswerT]) -> Iterator[tuple[str, ItemT, Job]]:
        """The items whose jobs must be sent, for as long as the window has room: those that could not be sent before,
        and then those that are read."""
        until = time.monotonic() + TURN_S
        yield from tuple(self._unsent)
        while len(self._flying) + len(self._unsent) < self._window and time.monotonic() < until and not self._is_read:
            if (unsent := self._read(answers)) is not None:
                self._unsent.append(unsent)
                yield unsent

    def _read(self, answers: list[AnswerT]) -> tuple[str, ItemT, Job] | None:
        """Read an item. Returns what must be sent, if its job must be."""
        try:
            item = next(self._items)
        except StopIteration:
            self._is_read = True
            return None
        if item is None:
            return None
        try:
            job = item.job()
        except JobError as fault:
            answers.append(self._work.answer(item, fault, self._work.job_id(item)))
            return None
        item = item.without_payload()
        id = self._work.job_id(item)
        if self._work.was_sent(item):
            self._flying[id] = item
            self._resumed.add(id)
            return None
        return id, item, job

    def _note_sent(self, jobs: int) -> None:
        """Note that the first `jobs` of the unsent ones were sent."""
        for _ in range(jobs):
            id, item, _ = self._unsent.popleft()
            self._flying[id] = item
            self._work.note_sent(item)

    def _collect(self, answers: list[AnswerT]) -> list[str]:
        """Remove the items whose jobs have ended from the window. Returns these jobs' ids."""
        outcomes: dict[str, Outcome] = self._client.outcomes(self._asked())
        answers += [self._work.answer(self._flying.pop(id), outcome, id) for id, outcome in outcomes.items()]
        self._resumed.difference_update(outcomes)
        return list(outcomes)

    def _asked(self) -> list[str]:
        """The ids of the jobs whose results are asked for now."""
        now = time.monotonic()
        if now - self._asked_all_at < ASK_ALL_S:
            return list(islice(self._flying, math.ceil(ASKED_PART * self._window)))
        self._asked_all_at = now
        return list(self._flying)

    def _forget(self, ids: list[str]) -> None:
        try:
            self._patiently(self._client.forget, ids)
        except NoPermissionError:
            # The Redis user may not delete results: they expire.
            self._keep_results = True

    def _patiently(self, call: Callable[[Any], Any], argument: Any) -> Any:
        """Make a call; if Redis is away, it is repeated later, or its keys expire."""
        try:
            return call(argument)
        except (RedisConnectionError, RedisTimeoutError, OperationalError) as error:
            self.trouble = str(from_broker(error))

    def _check_for_lost_jobs(self) -> None:
        if not self._flying or time.monotonic() - self._last_news < (RESUMED_LOST_S if self._resumed else LOST_S):
            return
        self._last_news = time.monotonic()
        try:
            # Of their own priority: where others always send more urgent ones, the whole queue is never empty. A job
            # that has started comes back by itself when its worker dies.
            waiting = self._work.queued(self._flying.values(), self._priority)
            are_lost = waiting == 0 and all(self._client.job(id).status == "starting" for id in self._flying)
        except (RedisError, OperationalError):
            # Unknown while Redis is away.
            return
        if are_lost:
            raise JobsLost(len(self._flying))
