"""Updates of streamed jobs: their stages and their text as it grows, in one Redis stream for each job.

A thread looks at all streamed runs every WRITE_INTERVAL_S and writes what is new in one transaction. Nothing is queued
for it: it reads the runs' tokens where the engine appends them, and turns them into text itself. So neither the engine
nor a job waits for it, and while Redis is away there is nothing to keep: once it is back, the text begins anew.

An entry has the fields `run` (which run of the job it is of), and `stage`, `text` and `end` where they are new. `end`
says that the text is whole. `tasks/updates.py` reads them.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from redis import Redis

from tasks.payloads import Job
from tasks.redis_keys import UPDATES
from worker.engine.row import Row
from worker.engine.stop_strings import Decode
from worker.jobs.live_text import LiveText
from worker.runtime import gil
from worker.runtime.cpu import leave_cores_to_the_engine

logger = logging.getLogger(__name__)

#: Minimum seconds between two writes, and between two entries of a run as a share of its age: so a run of an hour has
#: some hundred entries more than one of a minute.
WRITE_INTERVAL_S, WRITE_INTERVAL_SHARE = 0.05, 0.01
#: The share of a processor's time that the thread takes at most: it then writes less often, but for MAX_INTERVAL_S.
CPU_SHARE, MAX_INTERVAL_S = 0.015, 0.5
#: Seconds between two attempts while Redis refuses or is away.
AWAY_PAUSE_S = 1.0
#: Entries of a stream, those of all runs of its job, and characters of one run's text. What is beyond stands in the
#: result alone.
MAX_ENTRIES, MAX_CHARS = 5_000, 200_000
#: Seconds that a stream lives after its last entry.
TTL_S = 3_600

Entry = dict[str, str | bytes]


class RunUpdates:
    """What a run tells its job's watchers. This one is for jobs that are not streamed: it tells nothing."""

    def loading_images(self) -> None:
        """The run loads its images."""

    def follow(self, row: Row) -> None:
        """The run's row is in the engine, or will be."""

    def finish(self, text: str) -> None:
        """The run has this text in the end."""

    def close(self) -> None:
        """The run is over."""


NO_UPDATES = RunUpdates()


class LiveRun(RunUpdates):
    """One run of a streamed job. The job's thread says what it does, and the writer's thread takes what is new."""

    def __init__(self, key: str, decode: Decode, stop: Sequence[str] = ()) -> None:
        """`key`: the job's stream."""
        self.key = key
        self._decode, self._stop = decode, stop
        self._begun_at = time.monotonic()
        self._is_loading = self.is_over = False
        self._row: Row | None = None
        self._final: str | None = None
        self.restart()

    def loading_images(self) -> None:
        self._is_loading = True

    def follow(self, row: Row) -> None:
        self._row = row

    def finish(self, text: str) -> None:
        self._final = text

    def close(self) -> None:
        self.is_over = True

    def restart(self) -> None:
        """Let the next entry begin anew, under a new name of the run: readers drop what they have of the old one."""
        self._name = secrets.token_hex(4)
        self._stage = ""
        self._text = LiveText(self._text_of, self._stop)
        self._tokens: list[int] | None = None
        self._is_whole = False
        self._entry_at = float("-inf")

    def entry(self, now: float) -> Entry:
        """What is new since the last entry; empty if nothing is, or if it is too soon. `now`: time.monotonic()."""
        if not self.is_over and now - self._entry_at < WRITE_INTERVAL_SHARE * (now - self._begun_at):
            return {}
        # First the text: if it begins anew, so does the stage.
        text = self._new_text() if self._final is None else self._end(self._final)
        news = {**self._new_stage(), **text}
        if not news:
            return {}
        self._entry_at = now
        return {"run": self._name, **news}

    def _new_stage(self) -> Entry:
        is_running = self._final is not None or (self._row is not None and self._row.started > 0)
        stage = "running" if is_running else "loading_images" if self._is_loading else ""
        if stage == self._stage:
            return {}
        self._stage = stage
        return {"stage": stage}

    def _new_text(self) -> Entry:
        tokens = self._row.new_tokens if self._row else None
        if tokens is not self._tokens:
            if self._text.given:
                # The engine runs the row once more, after an error of its batch. A sampled text may differ.
                self.restart()
            self._tokens = tokens
        if not tokens or len(self._text.given) > MAX_CHARS:
            return {}
        return _as_entry(self._text.piece(tuple(tokens)))

    def _text_of(self, ids: Sequence[int]) -> str:
        grammar = self._row.grammar if self._row else None
        return grammar.text(ids) if grammar else self._decode(ids)

    def _end(self, final: str) -> Entry:
        if self._is_whole:
            return {}
        rest = self._text.rest(final)
        if rest is None:
            self.restart()
            rest = final
        self._is_whole = True
        return {**_as_entry(rest[:MAX_CHARS]), "end": "1"}


def _as_entry(text: str) -> Entry:
    # JSON can hold half of a surrogate pair, and UTF-8 cannot.
    return {"text": text.encode(errors="replace")} if text else {}


def pause_after(cpu_s: float) -> float:
    """Seconds until the next write, after one that took the thread so many seconds of the processor's time."""
    return min(max(WRITE_INTERVAL_S, cpu_s / CPU_SHARE), MAX_INTERVAL_S)


class LiveUpdates:
    """The streamed runs of this process, and the thread that writes their updates. Thread-safe."""

    def __init__(self, redis: Redis, decode: Decode, prefix: str = "") -> None:
        """`redis`: a client of the results' Redis. `prefix`: of all keys."""
        # The model process's own client retries, and has job threads wait for its connections.
        self._redis = Redis(connection_pool=redis.connection_pool)
        self._decode = decode
        self._prefix = prefix
        self._runs: set[LiveRun] = set()
        self._lock = threading.Lock()
        #: Set while there are runs.
        self._has_runs = threading.Event()
        self._is_failing = False
        #: Started by the first run; it ends with the process.
        self._thread: threading.Thread | None = None

    def begin(self, job: Job, id: str) -> RunUpdates:
        """A run of a job that begins: its updates are written if the job is streamed. It is to be closed."""
        if not job.stream:
            return NO_UPDATES
        run = LiveRun(self._prefix + UPDATES.named(id), self._decode, job.stop)
        with self._lock:
            self._runs.add(run)
            self._has_runs.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_forever, name="live-updates", daemon=True)
                self._thread.start()
        return run

    def flush(self) -> bool:
        """Write what is new. False if Redis did not take it: those runs then begin anew."""
        with self._lock:
            runs = list(self._runs)
            self._runs.difference_update([run for run in runs if run.is_over])
            if not self._runs:
                self._has_runs.clear()
        now = time.monotonic()
        with gil.held():
            entries = [(run, entry) for run in runs if (entry := run.entry(now))]
        try:
            self._send(entries)
        except Exception as error:
            if not self._is_failing:
                logger.warning("Updates of streamed jobs are dropped (%s): the jobs go on.", error)
            for run, _ in entries:
                run.restart()
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    def _send(self, entries: Sequence[tuple[LiveRun, Entry]]) -> None:
        if not entries:
            return
        # A transaction: no stream is left without its time to live.
        with self._redis.pipeline(transaction=True) as pipe:
            for run, entry in entries:
                pipe.xadd(run.key, dict[Any, Any](entry), maxlen=MAX_ENTRIES, approximate=True)
                pipe.expire(run.key, TTL_S)
            pipe.execute()

    def _write_forever(self) -> None:
        leave_cores_to_the_engine()
        pause_s = WRITE_INTERVAL_S
        while True:
            self._has_runs.wait()
            time.sleep(pause_s)
            began = time.thread_time()
            is_written = self.flush()
            pause_s = pause_after(time.thread_time() - began) if is_written else AWAY_PAUSE_S
