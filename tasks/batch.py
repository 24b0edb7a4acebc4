"""Bulk jobs: lines in, answers out, with a bounded number of jobs in flight.

```python
with open("in.jsonl", "rb") as lines:
    for answer in batch.run(client, lines):
        ...
```

`idefics-jobs batch` is the same for files, and resumes an interrupted batch (`tasks/cli/batch.py`).
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .batch_input import json_lines
from .batch_lines import Fingerprints, Line, answer, read_line
from .batch_models import LineModels
from .errors import IdeficsError, JobError, ModelNotFound, QueueFull, from_broker
from .outcomes import Outcome
from .payloads import Job

#: Jobs in flight: enough for some workers with full batches.
WINDOW = 1_000
#: Bulk jobs run after all others.
PRIORITY = 9

#: Seconds between two polls of the results: the longer pause follows a poll without results.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 0.5
#: Seconds of submitting between two polls.
TURN_S = 0.25
#: Seconds before a retry if Redis is away or the broker is full.
TROUBLE_PAUSE_S = 1.0
#: Seconds without any answer after which jobs that have neither started nor wait in the queue count as lost.
LOST_S = 600.0
#: The same if jobs of an earlier run are among them: their results may have expired, or were deleted when their answers
#: were written to an output that was cut later. A job that is sent again needlessly still ends once, by its id.
RESUMED_LOST_S = 10.0


def run(
    client: Any, lines: Iterable[str | bytes], *, window: int = WINDOW, priority: int = PRIORITY
) -> Iterator[dict[str, Any]]:
    """The answers to lines in our form or OpenAI's batch form (see batch_lines), in the order in which jobs end.

    An answer's result is deleted from Redis when the next answer is requested. Raises NotJsonLines, before anything is
    sent, for input that is clearly not lines of JSON.
    """
    for answers in Batch(client, lines, window=window, priority=priority).turns():
        yield from answers


class JobsLost(IdeficsError):
    """Jobs were sent and have neither an answer nor a place in the queue: Redis has lost them."""

    code = "jobs_lost"
    retryable = True
    http_status = 503
    public = {"": "Some of it was lost: try again later."}

    def __init__(self, jobs: int) -> None:
        super().__init__(f"{jobs} jobs have neither an answer nor a place in the queue: Redis has lost them.")


def _read_when_asked(lines: Iterable[str | bytes]) -> Iterator[str | bytes]:
    yield from json_lines(lines)


class Batch:
    """One pass over the lines. Waits while Redis is away or the broker is full."""

    def __init__(
        self,
        client: Any,
        lines: Iterable[str | bytes],
        *,
        window: int = WINDOW,
        priority: int = PRIORITY,
        name: str | None = None,
        done: Fingerprints | None = None,
        sent: int = 0,
        on_sent: Callable[[int], None] = lambda number: None,
        on_note: Callable[[str], None] = lambda text: None,
        keep_results: bool = False,
    ) -> None:
        """`name` identifies this batch's jobs, so that a later run finds their results.

        Lines in `done` are left out. Those up to number `sent` have their jobs in the queue or ended already;
        `on_sent` is told how far this is; `on_note` what the user should know, a sentence.
        """
        self._client = client
        self._models = LineModels(client, on_note)
        self._lines = enumerate(_read_when_asked(lines), 1)
        self._window = window
        self._priority = priority
        self._name = name or uuid.uuid4().hex
        self._done = done if done is not None else Fingerprints()
        self._sent = sent
        self._on_sent = on_sent
        self._keep_results = keep_results
        self._seen = Fingerprints()
        #: A line whose job could not be sent yet.
        self._held: tuple[Line, Job] | None = None
        self._is_read = False
        self._flying: dict[str, Line] = {}
        #: Ids of jobs that an earlier run sent.
        self._resumed: set[str] = set()
        self._last_news = time.monotonic()
        #: Number of lines read.
        self.read = 0
        #: Why the batch waits; empty if it does not.
        self.trouble = ""
        #: Ends the batch after this turn, without waiting for jobs in flight.
        self.is_stopped = False

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def turns(self) -> Iterator[list[dict[str, Any]]]:
        """The answers of each turn, often none. Their results are deleted at the next turn. Raises JobsLost."""
        pause = FIRST_PAUSE_S
        while not self.is_stopped and not (self._is_read and self._held is None and not self._flying):
            answers: list[dict[str, Any]] = []
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
            if answers or self.trouble:
                self._last_news = time.monotonic()
            pause = FIRST_PAUSE_S if answers else min(pause * 1.5, LAST_PAUSE_S)
            if self._is_read or self.trouble or self.in_flight >= self._window:
                self._check_for_lost_jobs()
                time.sleep(TROUBLE_PAUSE_S if self.trouble else pause)

    def _fill(self, answers: list[dict[str, Any]]) -> None:
        """Send jobs until the window is full."""
        until = time.monotonic() + TURN_S
        while len(self._flying) < self._window and time.monotonic() < until:
            if self._held is None and not self._read(answers):
                return
            if self._held is not None and not self._send(*self._held, answers):
                return

    def _read(self, answers: list[dict[str, Any]]) -> bool:
        """Read a line, and keep it if its job must be sent. False at the end."""
        number, text = next(self._lines, (0, ""))
        if not number:
            self._is_read = True
            return False
        self.read += 1
        if not text.strip():
            return True
        line = self._models.of(read_line(number, text))
        if not self._seen.add(line.fingerprint):
            line = line.as_duplicate()
        if line.fingerprint in self._done:
            return True
        try:
            job = line.job()
        except JobError as fault:
            answers.append(answer(line, fault, self._id(line)))
            return True
        line = line.without_payload()
        if number <= self._sent:
            self._flying[self._id(line)] = line
            self._resumed.add(self._id(line))
        else:
            self._held = line, job
        return True

    def _send(self, line: Line, job: Job, answers: list[dict[str, Any]]) -> bool:
        """Send a line's job. False if it is refused: its answer must be written before a later line's job is sent."""
        id = self._id(line)
        try:
            self._models.submit(line, job, priority=self._priority, task_id=id)
        except (JobError, ModelNotFound) as fault:
            if isinstance(fault, ModelNotFound) and line.model is None:
                # The client's own: no line could be sent.
                raise
            # Too large, with a callback that may not be called, or for a model that no worker serves.
            answers.append(answer(line, fault, id))
            self._held = None
            return False
        self._flying[id] = line
        self._held = None
        self._on_sent(line.number)
        return True

    def _id(self, line: Line) -> str:
        named = f"{self._name} {line.fingerprint} ".encode() + line.digest
        return str(uuid.UUID(bytes=hashlib.blake2b(named, digest_size=16).digest()))

    def _collect(self, answers: list[dict[str, Any]]) -> list[str]:
        """Remove the lines whose jobs have ended from the window. Returns these jobs' ids."""
        outcomes: dict[str, Outcome] = self._client.outcomes(self._flying)
        answers += [answer(self._flying.pop(id), outcome, id) for id, outcome in outcomes.items()]
        self._resumed.difference_update(outcomes)
        return list(outcomes)

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
            waiting = self._models.queued({line.model for line in self._flying.values()}, self._priority)
            are_lost = waiting == 0 and all(self._client.job(id).status == "starting" for id in self._flying)
        except (RedisError, OperationalError):
            # Unknown while Redis is away.
            return
        if are_lost:
            raise JobsLost(len(self._flying))
