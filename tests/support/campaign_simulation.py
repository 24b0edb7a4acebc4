"""A simulation of a campaign, event by event: hosts, downloads, retries and the model, without processes.

It knows nothing of how campaigns are forecast.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tasks.errors import ImageInvalid, ImageUnreachable, JobError
from tasks.results import ModelInfo, Result, Timing, Usage

MODEL = ModelInfo(id="fake", family="fake", dtype="float32")
#: Seconds for which a job waits for its host in its run; a longer wait is one in the queue.
MAX_WAIT_S = 1.0


@dataclass(frozen=True)
class Host:
    """How a host answers."""

    #: Mean seconds of a download.
    download_s: float
    #: Probabilities that a picture is missing, and that one answer is 503.
    missing: float = 0.0
    flaky: float = 0.0
    is_dead: bool = False


@dataclass(frozen=True)
class Workers:
    """The workers, in the words of their settings."""

    #: Jobs that they hold at once, and those of them that download.
    places: int = 192
    image_jobs: int = 64
    host_concurrency: int = 8
    image_timeout_s: float = 20.0
    max_retries: int = 3
    retry_backoff_s: float = 2.0
    #: Rows in the model at once, and mean seconds of each.
    model_rows: int = 16
    model_s: float = 0.1


@dataclass
class Row:
    """A row under way, and at last its outcome."""

    host: str
    is_missing: bool
    sent: float = 0.0
    began: float = 0.0
    queued_s: float = 0.0
    fetch_s: float = 0.0
    retries: int = 0
    fetched: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    outcome: Result | JobError | None = None


@dataclass
class Simulation:
    """Runs rows in order, at most `window` at a time."""

    hosts: dict[str, Host]
    workers: Workers
    window: int
    chance: random.Random
    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def run(self, names: Sequence[str]) -> tuple[list[Row], float]:
        """The rows of these hosts, each with its outcome, and the seconds of all."""
        rows = [Row(name, self.chance.random() < self.hosts[name].missing) for name in names]
        self._pending = deque(rows)
        self._ready: dict[str, deque[Row]] = {name: deque() for name in self.hosts}
        self._busy = dict.fromkeys(self.hosts, 0)
        self._model: deque[Row] = deque()
        self._held, self._downloads, self._in_model, self._in_flight = 0, 0, 0, 0
        self._admit()
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
        return rows, self.now

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._count), action))

    def _admit(self) -> None:
        while self._pending and self._in_flight < self.window:
            row = self._pending.popleft()
            row.sent = self.now
            self._in_flight += 1
            self._wait_for_host(row)

    def _wait_for_host(self, row: Row) -> None:
        row.began = self.now
        self._ready[row.host].append(row)
        self._download()

    def _download(self) -> None:
        free = [name for name, waiting in self._ready.items() if waiting]
        free.sort(key=lambda name: self._ready[name][0].began)
        for name in free:
            while (
                self._ready[name]
                and self._busy[name] < self.workers.host_concurrency
                and self._downloads < self.workers.image_jobs
                and self._held < self.workers.places
            ):
                row = self._ready[name].popleft()
                self._held += 1
                self._busy[name] += 1
                self._downloads += 1
                host = self.hosts[name]
                usual = host.download_s * self.chance.uniform(0.5, 1.5)
                seconds = self.workers.image_timeout_s if host.is_dead else usual
                waited = min(self.now - row.began, MAX_WAIT_S)
                row.queued_s, row.fetch_s = self.now - waited - row.sent, waited + seconds
                self._after(seconds, lambda row=row: self._fetched(row))  # type: ignore[misc]

    def _fetched(self, row: Row) -> None:
        host = self.hosts[row.host]
        self._busy[row.host] -= 1
        self._downloads -= 1
        if row.is_missing and not host.is_dead:
            self._end(row, ImageInvalid("There is none.", detail="http_404"))
        elif host.is_dead or self.chance.random() < host.flaky:
            self._retry(row, "timeout" if host.is_dead else "http_503")
        else:
            row.fetched = self.now
            self._model.append(row)
            self._compute()
        self._download()

    def _retry(self, row: Row, detail: str) -> None:
        if row.retries == self.workers.max_retries:
            self._end(row, ImageUnreachable("It is not there.", detail=detail))
            return
        self._held -= 1
        delay_s = self.workers.retry_backoff_s * 2**row.retries * self.chance.uniform(0.5, 1.0)
        row.retries += 1
        self._after(delay_s, lambda: self._wait_for_host(row))

    def _compute(self) -> None:
        while self._model and self._in_model < self.workers.model_rows:
            row = self._model.popleft()
            self._in_model += 1
            row.started = self.now
            self._after(
                self.workers.model_s * self.chance.uniform(0.5, 1.5),
                lambda row=row: self._answer(row),  # type: ignore[misc]
            )

    def _answer(self, row: Row) -> None:
        self._in_model -= 1
        timing = Timing(
            queued_s=row.queued_s,
            fetch_s=row.fetch_s,
            wait_s=row.started - row.fetched,
            generate_s=self.now - row.started,
            retries=row.retries,
        )
        usage = Usage(prompt_tokens=20, completion_tokens=self.chance.randint(5, 15), images=1)
        self._end(row, Result(text="", finish_reason="stop", usage=usage, model=MODEL, timing=timing))
        self._compute()

    def _end(self, row: Row, outcome: Result | JobError) -> None:
        row.outcome, row.ended = outcome, self.now
        self._held -= 1
        self._in_flight -= 1
        self._admit()
        self._download()
