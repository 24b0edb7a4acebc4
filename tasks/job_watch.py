"""Watching a job: its updates, read from Redis by polling, as its result is.

A poll is two or three short commands, so that a watcher holds neither a connection nor a thread while it waits. The
job's stored result alone says that it has ended: a watcher ends as the job ends, also if its worker died.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast, get_args

from celery import Celery, states
from celery.backends.redis import RedisBackend
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .broker_errors import with_our_errors
from .outcomes import Outcome
from .queue_position import positions_of
from .redis_keys import UPDATES, results_prefix
from .result_wait import ResultWait
from .updates import EndUpdate, RestartedUpdate, Stage, StageUpdate, TextUpdate, Update, text_of

#: Seconds between two polls: short while text comes.
FIRST_PAUSE_S, LAST_PAUSE_S, PAUSE_GROWTH = 0.02, 0.25, 1.2
#: Seconds for which a running job's stream may have no entry yet. After them it is taken for one that is not streamed.
NO_ENTRY_S = 0.5
#: Entries of one reply.
PAGE = 1_000


class JobWatch:
    """A watch on a job, to its end. For one thread at a time."""

    def __init__(
        self, app: Celery, id: str, queue: str | None, timeout: float | None = None, priority: int = 9
    ) -> None:
        """`queue`: where it waits, if that is known. `priority`: the job's, or the last one."""
        self._app = app
        self._id = id
        self._queue = queue
        self._priority = priority
        self._wait = ResultWait(app, id, queue, timeout)
        self._stream = UpdateStream(app, id)
        self._story = _Story()
        self._pause_s = FIRST_PAUSE_S
        self._started_at: float | None = None
        self.has_ended = False

    @with_our_errors
    def poll(self) -> list[Update]:
        """What is new since the last call. Raises as `ResultWait.poll` does."""
        # Before the stream: it then has all that was written before the end.
        outcome = self._wait.poll()
        found = list(self._story.of_entries(self._stream.read()))
        if outcome is not None:
            found += self._story.of_end(outcome)
            self.has_ended = True
        elif not found:
            found += self._story.of_stage(self._stage())
        has_text = any(isinstance(update, TextUpdate) for update in found)
        self._pause_s = FIRST_PAUSE_S if has_text else min(self._pause_s * PAUSE_GROWTH, LAST_PAUSE_S)
        return found

    def pause_s(self) -> float:
        """Seconds until the next poll."""
        return min(self._pause_s, self._wait.left_s)

    def _stage(self) -> StageUpdate | None:
        """The stage by Celery's state, for a job whose stream does not tell it."""
        state = self._wait.state
        if state == states.RETRY:
            return StageUpdate("queued")
        if state is None or self._story.is_told:
            return None
        if state in (states.PENDING, states.RECEIVED):
            ahead = positions_of(self._app).ahead(self._queue, self._id, self._priority) if self._queue else None
            return StageUpdate("queued", ahead)
        self._started_at = self._started_at or time.monotonic()
        return StageUpdate("running") if time.monotonic() - self._started_at >= NO_ENTRY_S else None


class UpdateStream:
    """A job's stream of updates (worker/jobs/live_updates.py), read from its beginning."""

    def __init__(self, app: Celery, id: str) -> None:
        self._backend = app.backend
        self._name = results_prefix(app) + UPDATES.named(id)
        self._last = "-"
        self._is_readable = isinstance(self._backend, RedisBackend)

    def read(self) -> Iterator[Mapping[str, str]]:
        """The entries since the last call; none for a job without a stream, and while Redis is away."""
        while self._is_readable:
            page = self._page()
            for id, fields in page:
                self._last = f"({_text(id)}"
                yield {_text(name): _text(value) for name, value in fields.items()}
            if len(page) < PAGE:
                return

    def _page(self) -> list[tuple[Any, dict[Any, Any]]]:
        try:
            return list(self._backend.client.xrange(self._name, min=self._last, count=PAGE) or [])
        except (RedisConnectionError, RedisTimeoutError):
            # The wait for the result says when that is too long.
            return []
        except ResponseError:
            # This user may not read it, or it is no stream: the result alone is told.
            self._is_readable = False
            return []


class _Story:
    """A stream's entries and a job's end as updates whose text is never doubled. Pure."""

    def __init__(self) -> None:
        self._run = ""
        #: Runs that later ones have replaced. A worker that was frozen may still write for one.
        self._replaced: set[str] = set()
        self._text: list[str] = []
        self._stage: StageUpdate | None = None

    @property
    def is_told(self) -> bool:
        """Whether the stream has an entry."""
        return bool(self._run)

    def of_entries(self, entries: Iterable[Mapping[str, str]]) -> Iterator[Update]:
        for entry in entries:
            run = entry.get("run", "")
            if run in self._replaced:
                continue
            if self._run not in ("", run):
                self._replaced.add(self._run)
                yield from self._restart()
            self._run = run
            if entry.get("stage") in get_args(Stage):
                yield from self.of_stage(StageUpdate(cast(Stage, entry["stage"])))
            if entry.get("text"):
                yield self._add(entry["text"])

    def of_stage(self, stage: StageUpdate | None) -> Iterator[Update]:
        if stage is not None and stage != self._stage:
            self._stage = stage
            yield stage

    def of_end(self, outcome: Outcome) -> Iterator[Update]:
        """The text that is still missing, and the end."""
        final = text_of(outcome) if self._run else None
        if final is not None:
            if not final.startswith("".join(self._text)):
                # Entries were trimmed, or the job ended in another run than the last one.
                yield from self._restart()
            if rest := final.removeprefix("".join(self._text)):
                yield self._add(rest)
        yield EndUpdate(outcome)

    def _restart(self) -> Iterator[Update]:
        self._text.clear()
        self._stage = None
        yield RestartedUpdate()

    def _add(self, text: str) -> TextUpdate:
        self._text.append(text)
        return TextUpdate(text)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
