"""A pool with a scripted model process, on an event loop of its own."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from kombu.asynchronous import Hub
from kombu.asynchronous.semaphore import LaxBoundedSemaphore

from config.settings import Settings
from worker.pool import pool as pool_module
from worker.pool.job import PoolJob
from worker.pool.pool import InferencePool
from worker.pool.wire import (
    CannotServe,
    Done,
    FromModelProcess,
    NonBlockingChannel,
    Ready,
    RunJob,
    Started,
    ToModelProcess,
)
from worker.queue.redeliveries import History, Key, RedeliveryCounter

THREADS = 100
#: Seconds that a test waits for what takes a tick of the pool.
SOON = 5.0
HANG_S = Settings().hang_timeout_s
LIMIT_S = Settings().time_limit_s
#: Seconds before the end of that limit: longer than `settle`.
SHORTLY = 0.5


class StubProcess:
    """Stands in for launch.ModelProcess: the test is its other end."""

    def __init__(self, pid: int) -> None:
        ours, theirs = socket.socketpair()
        self.channel, self._theirs = NonBlockingChannel(ours), NonBlockingChannel(theirs)
        self.write_fd = os.dup(ours.fileno())
        self.pid = pid
        self.is_ready = False
        self.started_at = self.last_heartbeat = time.monotonic()
        self.is_killed = False
        self._heard: list[ToModelProcess] = []

    # The pool's side

    def receive(self) -> tuple[list[FromModelProcess], bool]:
        return self.channel.receive()

    def kill(self) -> None:
        self.is_killed = True
        self.die()

    def end(self, grace_s: float = 0.0) -> int:
        return -9

    def close(self) -> None:
        self.channel.close()
        os.close(self.write_fd)

    # The test's side

    def say(self, message: FromModelProcess) -> None:
        self._theirs.send(message)

    def die(self) -> None:
        self.heard  # noqa: B018 - what was said to it is kept
        self._theirs.close()

    @property
    def heard(self) -> list[ToModelProcess]:
        if self._theirs.fileno() >= 0:
            self._heard += self._theirs.receive()[0]
        return self._heard

    @property
    def ran(self) -> list[str]:
        """Ids of the jobs that it was given, in order."""
        return [message.arguments[1] for message in self.heard if isinstance(message, RunJob)]

    def serial(self, id: str) -> int:
        runs = [message for message in self.heard if isinstance(message, RunJob)]
        return next(message.serial for message in reversed(runs) if message.arguments[1] == id)

    def accept(self, id: str, at: float | None = None) -> None:
        self.say(Started(self.serial(id), time.monotonic() if at is None else at))

    def finish(self, id: str) -> None:
        self.say(Done(self.serial(id), (0, f"answer of {id}", 0.1)))


class Request:
    """Celery's request behind a job: what the pool told it."""

    #: Of those that are given back.
    order = itertools.count()

    def __init__(self, id: str) -> None:
        self.id = id
        self.told: list[tuple[Any, ...]] = []
        self.job: PoolJob | None = None

    def on_accepted(self, pid: int, at: float) -> None:
        self.told.append(("accepted", pid, at))

    def on_success(self, outcome: tuple[Any, ...]) -> None:
        self.told.append(("success", outcome[1]))

    def give_back(self) -> None:
        self.told.append(("given back", next(self.order)))

    def on_failure(self, info: Any) -> None:
        self.told.append(("failure", info.exception))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.told]

    @property
    def error(self) -> BaseException:
        """What Celery makes of a failure: billiard wraps the exceptions that it pickles."""
        failures = [content[0] for kind, *content in self.told if kind == "failure"]
        assert len(failures) == 1, self.told
        return getattr(failures[0], "exc", failures[0])


class Semaphore(LaxBoundedSemaphore):  # type: ignore[misc]
    """Counts releases; Celery's own ignores those that are too many."""

    releases = 0

    def release(self) -> None:
        self.releases += 1
        super().release()


class Ledger(RedeliveryCounter):
    """Redeliveries counted without a server."""

    def __init__(self) -> None:
        super().__init__(most=3)
        self.histories: dict[Key, History] = {}
        #: Starts that are marked.
        self.counts: Counter[Key] = Counter()

    def history(self, key: Key) -> History:
        return self.histories.get(key, History())

    def mark_started(self, jobs: Iterable[tuple[Key, int]]) -> None:
        self.counts.update(key for key, _ in jobs)

    def unmark_started(self, jobs: Iterable[tuple[Key, int]]) -> None:
        self.counts.subtract(key for key, _ in jobs)

    def count_return(self, key: Key) -> None:
        known = self.history(key)
        self.histories[key] = History(known.returns + 1, known.deaths + 1)


class Bench:
    """A pool on an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        assert settings.state_file is not None
        self.state_file = settings.state_file
        self.processes: list[StubProcess] = []
        #: What the next processes do at their start; then they are ready.
        self.scripts: list[Callable[[StubProcess], None]] = []
        self.semaphore = Semaphore(1)
        self.ledger = Ledger()
        self.pool = InferencePool(
            limit=1,
            semaphore=self.semaphore,
            initargs=(None, "worker@here"),
            settings=settings,
            redeliveries=self.ledger,
            launch=self.new_process,
        )
        self.hub = Hub()

    def new_process(self, hostname: str) -> StubProcess:
        process = StubProcess(pid=1000 + len(self.processes))
        self.processes.append(process)
        script = self.scripts.pop(0) if self.scripts else ready
        script(process)
        return process

    def start(self) -> Bench:
        self.pool.start()
        self.semaphore.releases = 0
        self.pool.register_with_event_loop(self.hub)
        return self

    @property
    def process(self) -> StubProcess:
        return self.processes[-1]

    @property
    def state(self) -> str:
        """What the worker's state file says."""
        return str(json.loads(self.state_file.read_text())["state"])

    def submit(
        self,
        *ids: str,
        timeout: float | None = None,
        retries: int = 0,
        redelivered: bool = False,
        queue: str = "",
        body: bytes = b"[[], {}, {}]",
    ) -> list[Request]:
        requests = [Request(id) for id in ids]
        for request in requests:
            self.semaphore.acquire(self._apply, request, timeout, retries, redelivered, queue, body)
        return requests

    def _apply(
        self, request: Request, timeout: float | None, retries: int, redelivered: bool, queue: str, body: bytes
    ) -> None:
        context = {"id": request.id, "retries": retries, "args": ["secret"], "kwargs": {"image": "secret"}}
        if redelivered:
            context["delivery_info"] = {"redelivered": True, "routing_key": "idefics"}
        if queue:
            context["delivery_info"] = {**context.get("delivery_info", {}), "routing_key": queue}
        request.job = self.pool.apply_async(
            None,
            ("idefics.caption", request.id, context, body, "application/json", "utf-8"),
            accept_callback=request.on_accepted,
            callback=request.on_success,
            error_callback=request.on_failure,
            timeout=timeout,
        )

    def until(self, condition: Callable[[], Any]) -> None:
        """Run the event loop until a condition holds."""
        end = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < end, "the condition never held"
            self.hub.run_once()

    def settle(self) -> None:
        """Run the event loop for longer than a tick."""
        end = time.monotonic() + 2 * pool_module.TICK_S
        self.until(lambda: time.monotonic() > end)

    def die_and_restart(self) -> None:
        """The process dies and the next one is ready."""
        known = len(self.processes)
        self.process.die()
        self.until(lambda: len(self.processes) > known and self.process.is_ready)


def ready(process: StubProcess) -> None:
    process.say(Ready())


def loading(process: StubProcess) -> None:
    """It never gets ready."""


def dying(process: StubProcess) -> None:
    process.die()


def broken(process: StubProcess) -> None:
    process.say(CannotServe("There is no such model."))
    process.die()
