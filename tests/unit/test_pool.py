"""The pool with a scripted model process: what it sends, what it tells Celery, and what it does after a death."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import Terminated
from celery.exceptions import Reject, WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state
from kombu.asynchronous import Hub
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from redis.exceptions import ResponseError

from config.settings import Settings
from tasks.errors import DeadlineExceeded, Internal, WorkerLost
from tasks.protocol import SUBMITTED_AT
from worker.pool import lifecycle, load_sharing, supervisor
from worker.pool import pool as pool_module
from worker.pool.job import Callbacks, Job, JobState
from worker.pool.pool import InferencePool
from worker.pool.wire import (
    Abandon,
    Away,
    Broken,
    Cancel,
    Canceled,
    CannotServe,
    Channel,
    Done,
    FromModelProcess,
    GiveBack,
    Heartbeat,
    Raised,
    Ready,
    Returned,
    Run,
    Started,
    Stop,
    ToModelProcess,
    Withdrawn,
)
from worker.queue.load import LONGEST_S, Load
from worker.queue.redeliveries import History, Key, RedeliveryCounter
from worker.runtime.exceptions import exception_info

THREADS = 100
#: Seconds that a test waits for what takes a tick of the pool.
SOON = 5.0
HANG_S = Settings().hang_timeout_s
LIMIT_S = Settings().time_limit_s
#: Seconds before the end of that limit: longer than `settle`.
SHORTLY = 0.5


class StubProcess:
    """In the place of launch.ModelProcess: the test is its other end."""

    def __init__(self, pid: int) -> None:
        ours, theirs = socket.socketpair()
        self.channel, self._theirs = Channel(ours), Channel(theirs)
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
        return [message.arguments[1] for message in self.heard if isinstance(message, Run)]

    def serial(self, id: str) -> int:
        runs = [message for message in self.heard if isinstance(message, Run)]
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
        self.job: Job | None = None

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
    """Counts what Celery's own forgives."""

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

    def __init__(self) -> None:
        self.processes: list[StubProcess] = []
        #: What the next processes do at their start; then they are ready.
        self.scripts: list[Callable[[StubProcess], None]] = []
        self.semaphore = Semaphore(1)
        self.ledger = Ledger()
        self.pool = InferencePool(
            limit=1,
            semaphore=self.semaphore,
            initargs=(None, "worker@here"),
            deliveries=self.ledger,
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
        """Turn the loop until something is so."""
        end = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < end, "it never came to pass"
            self.hub.run_once()

    def settle(self) -> None:
        """Turn the loop for longer than a tick."""
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


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    for name in [name for name in os.environ if name.startswith("IDEFICS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IDEFICS_STATE_FILE", str(tmp_path / "state.json"))
    monkeypatch.setenv("IDEFICS_PREFETCH", str(THREADS))
    monkeypatch.setattr(pool_module, "TICK_S", 0.02)
    bench = Bench()
    yield bench
    worker_state.should_stop = None
    bench.pool.terminate()
    bench.hub.close()


@pytest.fixture
def started(bench: Bench) -> Bench:
    return bench.start()


# The way of a job


def test_the_pool_lets_in_as_many_jobs_as_it_has_threads(started: Bench) -> None:
    assert started.semaphore.initial_value == THREADS


def test_a_job_is_sent_accepted_and_done(started: Bench) -> None:
    (request,) = started.submit("a")
    assert started.process.ran == ["a"]
    started.process.accept("a", at=12.5)
    started.process.finish("a")
    started.until(lambda: len(request.told) == 2)
    assert request.told == [("accepted", started.process.pid, 12.5), ("success", "answer of a")]
    assert started.semaphore.releases == 1


def test_many_jobs_are_in_flight_at_once_and_end_in_any_order(started: Bench) -> None:
    requests = started.submit("a", "b", "c")
    assert started.process.ran == ["a", "b", "c"]
    for id in ("c", "a", "b"):
        started.process.finish(id)
    started.until(lambda: all(request.told for request in requests))
    assert [request.told for request in requests] == [[("success", f"answer of {id}")] for id in "abc"]
    assert started.semaphore.releases == 3


def test_a_job_is_sent_without_its_payloads_second_copy(started: Bench) -> None:
    started.submit("a")
    (message,) = started.process.heard
    name, id, request, body, kind, encoding = message.arguments
    assert (name, id, kind, encoding) == ("idefics.caption", "a", "application/json", "utf-8")
    assert body == b"[[], {}, {}]"
    assert set(request) == {"id", "retries", SUBMITTED_AT}


def test_a_rejection_is_told_as_a_failure(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.say(Raised(started.process.serial("a"), exception_info(ValueError("boom"))))
    started.until(lambda: request.told)
    assert isinstance(request.error, ValueError)
    assert started.semaphore.releases == 1


def test_an_outcome_that_comes_twice_counts_once(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.finish("a")
    started.process.finish("a")
    started.process.say(Done(999, (0, "nobody's", 0.1)))
    started.until(lambda: request.told)
    started.settle()
    assert request.kinds == ["success"]
    assert started.semaphore.releases == 1


def test_a_callback_that_fails_frees_its_place_and_the_pool_goes_on(started: Bench) -> None:
    (bad,) = started.submit("bad")
    bad.job.callbacks.success = None  # type: ignore[union-attr,assignment]
    (good,) = started.submit("good")
    started.process.finish("bad")
    started.process.finish("good")
    started.until(lambda: good.told)
    assert started.semaphore.releases == 2


def test_an_outcome_that_cannot_be_stored_sends_its_job_back_to_the_queue(started: Bench) -> None:
    (request,) = started.submit("a")

    def on_success(outcome: tuple[Any, ...]) -> None:
        raise ConnectionError("the results' server is away")

    assert request.job is not None
    request.job.callbacks.success = on_success
    started.process.accept("a")
    started.process.finish("a")
    started.until(lambda: request.told[-1:] and request.kinds[-1] == "failure")
    assert isinstance(request.error, Reject)
    assert request.error.requeue is True
    assert started.semaphore.releases == 1


def test_a_job_that_waited_for_redis_in_vain_goes_back_and_its_start_is_taken_off(started: Bench) -> None:
    started.ledger.histories["a", 0] = History(1, 1)
    (request,) = started.submit("a")
    started.process.accept("a")
    started.process.say(Away(started.process.serial("a")))
    started.until(lambda: "failure" in request.kinds)
    assert isinstance(request.error, Reject)
    assert request.error.requeue is True
    assert not started.ledger.counts["a", 0]


def test_waiting_for_redis_is_no_running_time() -> None:
    job = Job(0, ("name", "id", {}), Callbacks(max, max, max), hard_limit=2.0, cancel=lambda job: None)
    job.accept(1, at=100.0)
    job.waited_s = 5.0
    assert not job.is_overdue(now=106.9)
    assert job.is_overdue(now=107.1)


def test_an_outcome_that_cannot_be_told_for_a_defect_is_dropped_in_the_end(
    started: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    started.ledger.histories["a", 0] = History(2, 2)
    (request,) = started.submit("a", redelivered=True)
    started.process.accept("a")

    def on_success(outcome: tuple[Any, ...]) -> None:
        raise ResponseError("WRONGTYPE Operation against a key")

    assert request.job is not None
    request.job.callbacks.success = on_success
    started.process.finish("a")
    started.until(lambda: request.told[-1:] and request.kinds[-1] == "failure")
    assert isinstance(request.error, Reject)
    assert request.error.requeue is False
    assert "is dropped" in caplog.text


def test_a_job_that_its_task_gives_back_again_and_again_ends(started: Bench) -> None:
    for deaths, ends in ((0, False), (1, False), (2, True)):
        started.ledger.histories["a", 0] = History(deaths, deaths)
        (request,) = started.submit("a", redelivered=deaths > 0)
        started.process.accept("a")
        info = exception_info(Reject("its links cannot be sent", requeue=True))
        started.process.say(Raised(started.process.serial("a"), info))
        started.until(lambda told=request.told: told[-1:] and told[-1][0] == "failure")
        assert isinstance(request.error, Internal if ends else Reject)


def test_a_defect_outside_of_celerys_tracer_is_told_as_internal(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.accept("a")
    started.process.say(Broken(started.process.serial("a"), "SystemExit in the worker."))
    started.until(lambda: "failure" in request.kinds)
    assert isinstance(request.error, Internal)
    assert str(request.error) == "SystemExit in the worker."


def test_a_defect_in_a_cold_shutdown_sends_its_job_back(started: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "should_terminate", True)
    (request,) = started.submit("a")
    started.process.accept("a")
    started.process.say(Broken(started.process.serial("a"), "SystemExit in the worker."))
    started.until(lambda: "failure" in request.kinds)
    assert isinstance(request.error, Reject)
    assert request.error.requeue


def test_the_next_in_celerys_semaphore_takes_a_free_place(started: Bench) -> None:
    started.submit(*[f"job {n}" for n in range(THREADS)])
    started.submit("next")
    assert "next" not in started.process.ran
    started.process.finish("job 5")
    started.until(lambda: "next" in started.process.ran)


# Whether it wants more


def test_a_pool_wants_no_jobs_until_its_next_process_is_ready(started: Bench) -> None:
    started.until(lambda: started.pool.wants_jobs)
    started.scripts.append(loading)
    started.process.die()
    started.until(lambda: len(started.processes) == 2)
    assert not started.pool.wants_jobs
    started.process.say(Ready())
    started.until(lambda: started.pool.wants_jobs)


def test_a_pool_wants_no_jobs_while_suspects_run(started: Bench) -> None:
    started.submit("a", "b")
    started.die_and_restart()
    for ran in (["a"], ["a", "b"]):
        started.until(lambda ran=ran: started.process.ran == ran)
        assert not started.pool.wants_jobs
        started.process.finish(ran[-1])
    started.until(lambda: started.pool.wants_jobs)


def test_a_pool_wants_no_jobs_while_its_process_is_silent(started: Bench) -> None:
    started.process.last_heartbeat -= 0.11 * HANG_S
    assert not started.pool.wants_jobs
    started.process.say(Heartbeat({}, THREADS, THREADS, 0.0, 0.0))
    started.until(lambda: started.pool.wants_jobs)


# Jobs that are better left to other workers


@pytest.fixture
def hoarding(started: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Jobs may go back at once."""
    monkeypatch.setattr(load_sharing, "KEPT_S", -1.0)
    return started


def asked(bench: Bench) -> list[GiveBack]:
    return [message for message in bench.process.heard if isinstance(message, GiveBack)]


def test_a_pool_tells_its_load(started: Bench) -> None:
    slots = Settings().max_batch_size
    started.submit("a", "b")
    assert started.pool.load.unbegun == 2 - slots
    started.process.say(Heartbeat({}, 1, 1.0, 2.5, 2.0))
    started.until(lambda: started.pool.load == Load(1.0, 2.5, 1, closed_s=2.0))


def test_a_pool_whose_model_loads_begins_nothing(started: Bench) -> None:
    started.scripts.append(loading)
    started.process.die()
    started.until(lambda: len(started.processes) == 2)
    started.submit("a")
    assert not started.pool.load.is_open
    assert started.pool.load.ends_in_s() >= LONGEST_S
    assert started.pool.load.unbegun == 1


def test_a_full_pool_whose_places_wait_for_images_takes_nothing(started: Bench) -> None:
    started.submit(*map(str, range(THREADS)))
    started.process.say(Heartbeat({}, 2 * THREADS, 1.0, 1.0, 0.0))
    started.until(lambda: not started.pool.load.is_open)


def test_a_pool_that_leaves_jobs_to_others_wants_none(started: Bench) -> None:
    started.until(lambda: started.pool.wants_jobs)
    started.pool.leaves_to_others = True
    assert not started.pool.wants_jobs


def test_jobs_that_have_not_begun_go_back_together_the_latest_first(hoarding: Bench) -> None:
    requests = hoarding.submit("a", "b", "c", queue="idefics")
    serials = [hoarding.process.serial(id) for id in "abc"]
    hoarding.pool.give_back("idefics", 2)
    assert asked(hoarding) == [GiveBack(2, serials)]
    hoarding.process.say(Withdrawn(serials[1:]))
    hoarding.process.say(Returned(serials[1]))
    hoarding.settle()
    assert not any(request.told for request in requests)
    hoarding.process.say(Returned(serials[2]))
    hoarding.until(lambda: requests[1].told and requests[2].told)
    assert requests[2].told[0][1] < requests[1].told[0][1]
    assert hoarding.semaphore.releases == 2
    hoarding.process.finish("a")
    hoarding.until(lambda: requests[0].told)
    assert requests[0].kinds == ["success"]


def test_jobs_that_return_do_not_wait_for_ever_for_the_others(hoarding: Bench) -> None:
    a, b = hoarding.submit("a", "b", queue="idefics")
    hoarding.process.say(Withdrawn([hoarding.process.serial(id) for id in "ab"]))
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.until(lambda: a.told)
    hoarding.process.say(Returned(hoarding.process.serial("b")))
    hoarding.until(lambda: b.told)
    assert (a.kinds, b.kinds) == (["given back"], ["given back"])


def test_jobs_of_another_queue_and_young_ones_stay(started: Bench) -> None:
    started.submit("a", queue="other")
    started.submit("b", queue="idefics")
    started.pool.give_back("idefics", 9)
    assert asked(started) == []


def test_a_job_that_is_canceled_on_its_way_back_is_revoked(hoarding: Bench) -> None:
    (request,) = hoarding.submit("a", queue="idefics")
    hoarding.process.say(Withdrawn([hoarding.process.serial("a")]))
    request.job.terminate()
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.until(lambda: request.told)
    assert isinstance(request.error, Terminated)


def test_jobs_that_wait_for_a_new_process_go_back_and_its_suspects_stay(hoarding: Bench) -> None:
    (suspect,) = hoarding.submit("suspect", queue="idefics")
    hoarding.scripts.append(loading)
    hoarding.process.die()
    hoarding.until(lambda: len(hoarding.processes) == 2)
    (innocent,) = hoarding.submit("innocent", queue="idefics")
    hoarding.pool.give_back("idefics", 9)
    assert innocent.kinds == ["given back"]
    assert suspect.told == []
    hoarding.process.say(Ready())
    hoarding.until(lambda: hoarding.process.ran == ["suspect"])


def test_a_death_while_jobs_return_loses_none(hoarding: Bench) -> None:
    hoarding.submit("a", "b", queue="idefics")
    hoarding.process.say(Withdrawn([hoarding.process.serial(id) for id in "ab"]))
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.settle()
    hoarding.die_and_restart()
    hoarding.until(lambda: hoarding.process.ran)
    hoarding.process.finish("a")
    hoarding.until(lambda: hoarding.process.ran == ["a", "b"])


def test_a_job_that_goes_back_was_not_started_in_vain(hoarding: Bench) -> None:
    hoarding.ledger.histories["a", 0] = History(1, 1)
    hoarding.submit("a", queue="idefics", redelivered=True)
    assert hoarding.ledger.counts == {("a", 0): 1}
    hoarding.process.say(Withdrawn([hoarding.process.serial("a")]))
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.until(lambda: hoarding.semaphore.releases == 1)
    assert hoarding.ledger.counts == {("a", 0): 0}


# Redeliveries


def test_a_job_that_is_delivered_once_is_not_counted(started: Bench) -> None:
    started.submit("a")
    started.process.finish("a")
    assert not started.ledger.counts


def test_a_job_that_only_says_that_it_was_redelivered_is_none(started: Bench) -> None:
    started.submit("first")
    started.submit("forged", redelivered=True)
    assert started.process.ran == ["first", "forged"]
    assert not started.ledger.counts


def test_the_start_of_a_job_that_came_back_is_marked(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(1, 1)
    (suspect,) = started.submit("bad", redelivered=True)
    assert started.ledger.counts == {("bad", 0): 1}
    started.process.finish("bad")
    started.until(lambda: suspect.told)
    assert suspect.kinds == ["success"]


def test_a_job_that_came_back_and_waits_for_the_model_is_not_marked(bench: Bench) -> None:
    bench.ledger.histories["waits", 0] = History(1, 1)
    bench.start()
    bench.scripts.append(loading)
    bench.process.die()
    bench.until(lambda: len(bench.processes) == 2)
    bench.submit("waits", redelivered=True)
    assert not bench.ledger.counts
    bench.process.say(Ready())
    bench.until(lambda: bench.process.ran)
    assert bench.ledger.counts == {("waits", 0): 1}


def test_deaths_of_the_model_process_alone_are_not_counted(started: Bench) -> None:
    started.ledger.histories |= {(id, 0): History(1, 1) for id in "abc"}
    requests = started.submit("a", "b", "c", redelivered=True)
    for _ in range(2):
        started.die_and_restart()
        started.until(lambda: started.process.ran)
    assert set(started.ledger.counts.values()) == {1}
    assert not any(request.kinds == ["failure"] for request in requests[1:])


def test_a_message_that_comes_again_while_its_job_runs_is_not_counted(started: Bench) -> None:
    started.submit("a")
    started.submit("a", redelivered=True)
    assert not started.ledger.counts


def test_a_job_that_was_there_at_two_deaths_runs_alone(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(2, 2)
    started.submit("first")
    started.submit("bad", redelivered=True)
    started.submit("last")
    assert started.process.ran == ["first"]
    started.process.finish("first")
    started.until(lambda: started.process.ran == ["first", "bad"])
    started.process.finish("bad")
    started.until(lambda: started.process.ran == ["first", "bad", "last"])


def test_a_job_that_was_there_at_three_deaths_fails_and_frees_its_place(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(3, 3)
    (bad,) = started.submit("bad", redelivered=True)
    assert isinstance(bad.error, WorkerLost)
    assert str(bad.error).startswith("3 workers died with this job")
    assert started.process.ran == []
    assert started.semaphore.releases == 1


def test_another_attempt_of_a_job_is_counted_for_itself(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(3, 3)
    started.submit("bad", redelivered=True, retries=1)
    assert started.process.ran == ["bad"]


def test_what_a_stopping_worker_gives_back_is_taken_off(started: Bench) -> None:
    started.ledger.histories["old", 0] = History(1, 1)
    started.submit("new")
    started.submit("old", redelivered=True)
    for _ in range(2):
        started.pool.terminate()
        assert started.ledger.counts == {("old", 0): 0}


# Adoption


def test_a_message_delivered_again_while_its_job_runs_is_answered_by_the_same_run(started: Bench) -> None:
    (first,) = started.submit("a")
    started.process.accept("a", at=12.5)
    started.until(lambda: first.told)
    (again,) = started.submit("a")
    assert again.job is first.job
    assert started.process.ran == ["a"]
    assert again.told == [("accepted", started.process.pid, 12.5)]
    assert started.semaphore.releases == 1
    started.process.finish("a")
    started.until(lambda: len(again.told) == 2)
    assert again.kinds == ["accepted", "success"]
    assert first.kinds == ["accepted"]
    assert started.semaphore.releases == 2


def test_a_message_delivered_again_before_its_job_started_is_accepted_when_it_does(started: Bench) -> None:
    started.submit("a")
    (again,) = started.submit("a")
    assert again.told == []
    started.process.accept("a")
    started.until(lambda: again.told)
    assert again.kinds == ["accepted"]


def test_a_retry_is_a_job_of_its_own(started: Bench) -> None:
    (first,) = started.submit("a")
    (retry,) = started.submit("a", retries=1)
    assert retry.job is not first.job
    started.process.finish("a")
    started.until(lambda: started.process.ran == ["a", "a"])


ONE, OTHER = b'[[], {"image": "1"}, {}]', b'[[], {"image": "2"}, {}]'


def test_another_job_under_the_id_of_one_that_runs_runs_after_it(started: Bench) -> None:
    (first,), (second,) = started.submit("a", body=ONE), started.submit("a", body=OTHER)
    started.submit("b")
    assert started.process.ran == ["a", "b"]
    started.process.finish("a")
    started.until(lambda: started.process.ran == ["a", "b", "a"])
    assert (first.kinds, second.kinds) == (["success"], [])
    started.process.finish("a")
    started.until(lambda: second.told)
    assert second.kinds == ["success"]
    assert started.semaphore.releases == 2


def test_a_job_that_is_sent_again_after_another_one_under_its_id_runs_again(started: Bench) -> None:
    requests = [started.submit("a", body=body)[0] for body in (ONE, OTHER, ONE)]
    for count in (1, 2, 3):
        started.until(lambda count=count: len(started.process.ran) == count)
        started.process.finish("a")
    started.until(lambda: all(request.told for request in requests))
    assert [request.kinds for request in requests] == [["success"]] * 3


def test_a_job_that_is_written_in_another_way_is_the_same(started: Bench) -> None:
    (first,) = started.submit("a", body=b'[[], {"image": "1", "seed": null}, {}]')
    (again,) = started.submit("a", body=b'[[], {"seed":null,"image":"1"}, {"chain": null}]')
    assert again.job is first.job


def test_a_job_whose_id_is_free_by_anothers_time_limit_runs(started: Bench) -> None:
    started.submit("a", body=ONE, timeout=0.05)
    started.submit("a", body=OTHER)
    started.process.accept("a")
    started.until(lambda: started.process.ran == ["a", "a"])


# Closing


def test_a_closed_pool_takes_no_job(started: Bench) -> None:
    started.pool.close()
    (request,) = started.submit("a")
    assert request.job is None
    assert started.process.ran == []


def test_what_ends_after_the_close_is_told_and_frees_no_place(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.close()
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]
    assert started.semaphore.releases == 0


def test_a_warm_shutdown_waits_for_what_runs_and_then_ends_the_process(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.close()
    process = started.process
    process.finish("a")
    started.pool.stop()
    assert request.kinds == ["success"]
    assert process.heard[-1] == Stop()
    assert started.semaphore.releases == 0


def test_a_soft_shutdown_is_over_when_the_last_running_job_is(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.finish("a")
    began = time.monotonic()
    started.pool.drain(timeout=60)
    assert time.monotonic() - began < SOON
    assert request.kinds == ["success"]


def test_a_soft_shutdown_waits_no_longer_than_its_time(started: Bench) -> None:
    (request,) = started.submit("a")
    began = time.monotonic()
    started.pool.drain(timeout=0.1)
    assert 0.1 <= time.monotonic() - began < SOON
    assert request.told == []


def test_a_cold_shutdown_does_not_wait_for_a_job_that_does_not_end(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LEAVE_S", 0.1)
    monkeypatch.setattr(worker_state, "should_terminate", True)
    (request,) = started.submit("a")
    request.job.terminate()  # type: ignore[union-attr]
    began = time.monotonic()
    started.pool.stop()
    assert time.monotonic() - began < SOON
    assert request.told == []


def test_a_cold_shutdown_tells_nothing_so_that_every_job_goes_back(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.terminate()
    assert request.told == []
    assert started.semaphore.releases == 0


def test_a_death_after_the_close_starts_no_process(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.close()
    started.process.die()
    started.settle()
    assert len(started.processes) == 1
    assert request.told == []


# Cancelling


def test_a_running_job_is_canceled_in_its_process(started: Bench) -> None:
    canceled, other = started.submit("a", "b")
    started.process.accept("a")
    started.until(lambda: canceled.told)
    canceled.job.terminate()  # type: ignore[union-attr]
    assert started.process.heard[-1] == Cancel(started.process.serial("a"))
    assert canceled.kinds == ["accepted"]
    started.process.say(Canceled(started.process.serial("a"), {"text": "so far"}))
    started.until(lambda: len(canceled.told) == 2)
    assert isinstance(canceled.error, Terminated)
    assert canceled.job.partial == {"text": "so far"}  # type: ignore[union-attr]
    assert other.told == []
    assert started.semaphore.releases == 1


def test_a_job_that_waits_for_a_process_is_canceled_at_once_and_never_sent(started: Bench) -> None:
    started.scripts = [loading]
    (request,) = started.submit("a")
    started.process.die()
    started.until(lambda: len(started.processes) == 2)
    request.job.terminate()  # type: ignore[union-attr]
    assert isinstance(request.error, Terminated)
    assert started.semaphore.releases == 1
    started.process.say(Ready())
    started.settle()
    assert started.process.ran == []


def test_a_job_that_was_done_before_its_cancellation_arrived_is_done(started: Bench) -> None:
    (request,) = started.submit("a")
    request.job.terminate()  # type: ignore[union-attr]
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]
    assert started.semaphore.releases == 1


def test_a_canceled_job_does_not_run_again_after_a_death(started: Bench) -> None:
    canceled, other = started.submit("a", "b")
    canceled.job.terminate()  # type: ignore[union-attr]
    started.die_and_restart()
    assert isinstance(canceled.error, Terminated)
    assert started.process.ran == ["b"]
    started.process.finish("b")
    started.until(lambda: other.told)
    assert started.semaphore.releases == 2


# Death


def test_a_job_whose_process_died_runs_again_and_is_accepted_once(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.accept("a")
    started.until(lambda: request.told)
    started.die_and_restart()
    assert started.process.ran == ["a"]
    started.process.accept("a")
    started.process.finish("a")
    started.until(lambda: "success" in request.kinds)
    assert request.kinds == ["accepted", "success"]
    assert started.semaphore.releases == 1


def test_a_job_that_runs_again_is_marked_as_redelivered(started: Bench) -> None:
    started.submit("a")
    started.die_and_restart()
    started.until(lambda: started.process.ran)
    assert started.process.heard[0].arguments[2]["delivery_info"] == {"redelivered": True}


def test_what_a_process_said_before_it_died_counts(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.finish("a")
    started.die_and_restart()
    assert request.kinds == ["success"]
    assert started.process.ran == []


def test_a_process_that_dies_idle_is_replaced(started: Bench) -> None:
    started.die_and_restart()
    (request,) = started.submit("a")
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]


def test_suspects_run_one_after_the_other_and_newcomers_wait(started: Bench) -> None:
    started.submit("a", "b", "c")
    started.die_and_restart()
    started.submit("new")
    assert started.process.ran == ["a"]
    for done, after in [("a", ["a", "b"]), ("b", ["a", "b", "c"]), ("c", ["a", "b", "c", "new"])]:
        started.process.finish(done)
        started.until(lambda after=after: started.process.ran == after)


def test_a_job_that_kills_its_process_twice_alone_is_lost(started: Bench) -> None:
    (request,) = started.submit("a")
    started.die_and_restart()
    assert request.told == []
    started.die_and_restart()
    assert isinstance(request.error, WorkerLost)
    assert request.kinds == ["failure"]
    assert started.semaphore.releases == 1
    assert started.process.ran == []


def test_a_job_that_kills_its_process_is_found_and_its_neighbours_succeed(started: Bench) -> None:
    requests = started.submit("a", "poison", "b")
    play(started, requests, {"poison"})
    assert [request.kinds[-1] for request in requests] == ["success", "failure", "success"]
    assert isinstance(requests[1].error, WorkerLost)
    assert len(started.processes) - 1 == 3
    assert started.semaphore.releases == 3


def test_one_poisonous_job_of_64_costs_few_deaths_and_no_innocent(started: Bench) -> None:
    ids = [f"job {n}" for n in range(63)]
    requests = started.submit(*ids[:40], "poison", *ids[40:])
    play(started, requests, {"poison"})
    failed = [request.id for request in requests if request.kinds[-1] == "failure"]
    assert failed == ["poison"]
    assert len(started.processes) - 1 <= 6
    assert all(request.kinds.count("success") == 1 for request in requests if request.id != "poison")
    assert started.semaphore.releases == 64


def play(bench: Bench, requests: list[Request], poison: set[str]) -> None:
    """Run all jobs; a process with a poisonous one dies before it finishes any."""
    finished: set[tuple[int, str]] = set()

    def act() -> bool:
        process = bench.process
        new = [id for id in process.ran if (process.pid, id) not in finished]
        if process.is_ready and poison & set(new):
            process.die()
        elif process.is_ready:
            for id in new:
                process.finish(id)
        finished.update((process.pid, id) for id in new)
        return all("success" in request.kinds or "failure" in request.kinds for request in requests)

    bench.until(act)
    # The last death's successor.
    bench.until(lambda: bench.process.is_ready)


# Limits


def test_a_job_over_its_hard_limit_fails_alone_and_its_neighbours_run_again_together(started: Bench) -> None:
    slow, *others = started.submit("slow", "b", "c", timeout=LIMIT_S)
    started.process.accept("b")
    started.process.accept("slow", at=time.monotonic() - LIMIT_S - 1)
    old = started.process
    started.until(lambda: "failure" in slow.kinds)
    assert isinstance(slow.error, DeadlineExceeded)
    assert old.is_killed
    started.until(lambda: started.process is not old and started.process.ran)
    # Together: nobody suspects them.
    assert started.process.ran == ["b", "c"]
    for id in ("b", "c"):
        started.process.finish(id)
    started.until(lambda: all("success" in request.kinds for request in others))
    assert slow.kinds == ["accepted", "failure"]
    assert started.semaphore.releases == 3


def test_a_job_over_a_limit_of_its_own_fails_alone_and_the_process_stays(started: Bench) -> None:
    slow, other = started.submit("slow", "b", timeout=30)
    process = started.process
    process.accept("slow", at=time.monotonic() - LIMIT_S + SHORTLY)
    started.until(lambda: "failure" in slow.kinds)
    assert isinstance(slow.error, DeadlineExceeded)
    assert Abandon(process.serial("slow")) in process.heard
    # What its thread says later is of no interest.
    for id in ("slow", "b"):
        process.finish(id)
    started.until(lambda: "success" in other.kinds)
    assert slow.kinds == ["accepted", "failure"]
    assert started.semaphore.releases == 2
    time.sleep(SHORTLY)
    started.settle()
    assert not process.is_killed


def test_a_thread_that_overstays_the_workers_own_limit_has_the_process_replaced(started: Bench) -> None:
    started.submit("slow", "b", timeout=30)
    old = started.process
    old.accept("slow", at=time.monotonic() - LIMIT_S + SHORTLY)
    started.settle()
    assert not old.is_killed
    started.until(lambda: started.process is not old and started.process.ran)
    assert started.process.ran == ["b"]
    started.settle()
    assert not started.process.is_killed


def test_a_neighbour_of_overdue_jobs_is_never_lost(started: Bench) -> None:
    (neighbour,) = started.submit("neighbour")
    for n in range(4):
        old = started.process
        started.submit(f"slow {n}", timeout=LIMIT_S)
        old.accept(f"slow {n}", at=time.monotonic() - LIMIT_S - 1)
        started.until(lambda old=old: started.process is not old and "neighbour" in started.process.ran)
    assert neighbour.told == []


def test_a_limit_counts_from_the_start_and_not_from_the_queue(started: Bench) -> None:
    (request,) = started.submit("a", timeout=0.01)
    time.sleep(0.03)
    started.settle()
    assert request.told == []


def test_a_job_without_a_limit_runs_as_long_as_it_likes(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.accept("a", at=time.monotonic() - 1e6)
    started.settle()
    assert request.kinds == ["accepted"]


def test_a_process_without_a_sign_of_life_is_replaced_and_its_job_runs_again(started: Bench) -> None:
    started.submit("a")
    old = started.process
    old.last_heartbeat -= HANG_S + 1
    started.until(lambda: started.process is not old and started.process.ran)
    assert old.is_killed
    assert started.process.ran == ["a"]


def test_a_beat_is_a_sign_of_life(started: Bench) -> None:
    process = started.process
    process.last_heartbeat -= HANG_S - 0.01
    process.say(Heartbeat({}, THREADS, THREADS, 0.0, 0.0))
    started.settle()
    assert not process.is_killed


def test_a_pool_that_stood_still_hears_first_which_jobs_have_ended_before_their_limits(started: Bench) -> None:
    (request,) = started.submit("a", timeout=30)
    started.process.accept("a", at=time.monotonic() - 20)
    started.until(lambda: request.told)
    assert request.job is not None
    request.job.accepted_at = time.monotonic() - 31
    started.process.finish("a")
    time.sleep(2 * pool_module.TICK_S)
    started.hub.fire_timers()
    assert request.kinds == ["accepted", "success"]
    assert not started.process.is_killed


def test_jobs_that_come_and_go_are_no_sign_of_life_of_the_engine(started: Bench) -> None:
    started.submit("a")
    old = started.process
    old.last_heartbeat -= HANG_S - 0.05

    def killed_although_it_says_something() -> bool:
        old.accept("a")
        return old.is_killed

    started.until(killed_although_it_says_something)


# Starting


def test_the_pool_starts_once_the_model_answers(bench: Bench) -> None:
    bench.start()
    assert bench.pool.info["ready"] is True
    assert bench.pool.info["processes"] == [1000]
    assert bench.pool.info["max-concurrency"] == THREADS


def test_a_model_that_cannot_be_served_stops_the_worker(bench: Bench) -> None:
    bench.scripts = [broken]
    with pytest.raises(WorkerShutdown) as stopped:
        bench.pool.start()
    assert stopped.value.code == EX_FAILURE
    assert len(bench.processes) == 1


def test_a_model_that_can_no_longer_be_served_stops_the_worker_for_good(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0, 0.0, 0.0))
    started.scripts = [broken, broken, broken]
    started.process.die()
    started.until(lambda: worker_state.should_stop is not None)
    assert worker_state.should_stop == EX_FAILURE
    started.settle()
    assert len(started.processes) == 2


def test_a_process_that_dies_while_it_loads_is_started_again_with_a_growing_delay(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.05, 0.2))
    bench.scripts = [dying, dying]
    bench.pool.start()
    first, second, third = (process.started_at for process in bench.processes)
    assert second - first >= 0.05
    assert third - second >= 0.2
    assert bench.process.is_ready


def test_the_delays_grow_by_default() -> None:
    delays = supervisor.RESTART_DELAYS
    assert len(delays) >= 2
    assert list(delays) == sorted(delays)
    assert delays[0] > 0


def test_a_process_that_always_dies_while_it_loads_stops_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0, 0.0, 0.0))
    bench.scripts = [dying] * 10
    with pytest.raises(WorkerShutdown) as stopped:
        bench.pool.start()
    assert stopped.value.code == EX_FAILURE
    assert len(bench.processes) == 4


def test_a_process_that_loads_for_too_long_is_replaced_and_the_cure_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0,))

    def stuck(process: StubProcess) -> None:
        process.started_at -= 1_000_000

    bench.scripts = [stuck]
    bench.pool.start()
    assert bench.processes[0].is_killed
    assert len(bench.processes) == 2
    assert "did not load within IDEFICS_LOAD_TIMEOUT_S" in caplog.text


def test_a_process_that_was_ready_starts_the_count_anew(started: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0,))
    for _ in range(3):
        started.scripts = [dying]
        known = len(started.processes)
        started.process.die()
        started.until(lambda known=known: len(started.processes) == known + 2 and started.process.is_ready)
    assert worker_state.should_stop is None


# The event loop


def test_a_reconnect_gives_the_pool_an_empty_loop_and_no_message_is_lost(started: Bench) -> None:
    (request,) = started.submit("a")
    old, started.hub = started.hub, Hub()
    old.close()
    started.pool.register_with_event_loop(started.hub)
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]


def test_a_process_that_reads_slowly_does_not_block_the_loop(started: Bench) -> None:
    body = b"x" * 1_000_000
    started.pool.apply_async(
        None,
        ("idefics.caption", "big", {"retries": 0}, body, "application/json", "utf-8"),
        accept_callback=print,
        callback=print,
        error_callback=print,
    )
    assert started.process.channel.has_unsent
    started.until(lambda: started.process.ran == ["big"])
    assert not started.process.channel.has_unsent


def test_revoking_by_the_process_id_spares_the_neighbours(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.terminate_job(started.process.pid, 15)
    assert not started.process.is_killed
    assert request.job is not None
    assert request.job.state is JobState.SENT


# What the state file says


def health() -> str:
    """The state's name."""
    return str(json.loads(Path(os.environ["IDEFICS_STATE_FILE"]).read_text())["state"])


def test_a_worker_with_a_free_place_is_ready_and_a_full_one_busy(started: Bench) -> None:
    started.until(lambda: health() == "READY")
    started.submit(*map(str, range(THREADS)))
    started.until(lambda: health() == "BUSY")
    started.process.finish("0")
    started.until(lambda: health() == "READY")


def test_a_worker_is_unhealthy_from_its_process_death_until_the_next_is_ready(started: Bench) -> None:
    started.scripts = [loading]
    started.process.die()
    started.until(lambda: health() == "UNHEALTHY")
    started.process.say(Ready())
    started.until(lambda: health() == "READY")


def test_a_worker_is_unhealthy_long_before_its_silent_process_is_replaced(started: Bench) -> None:
    started.process.last_heartbeat -= 0.11 * HANG_S
    started.until(lambda: health() == "UNHEALTHY")
    assert not started.process.is_killed
    started.process.say(Heartbeat({}, THREADS, THREADS, 0.0, 0.0))
    started.until(lambda: health() == "READY")


def test_a_worker_whose_model_cannot_be_served_says_so_beyond_its_end(bench: Bench) -> None:
    bench.scripts = [broken]
    with pytest.raises(WorkerShutdown):
        bench.pool.start()
    assert health() == "SETUP_FAILED"


def test_a_worker_that_loads_is_starting_and_one_that_dies_loading_unhealthy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def looked() -> None:
        said.append(health())
        if len(said) == 20:
            raise WorkerShutdown(0)
        if len(said) == 10:
            bench.process.die()

    monkeypatch.setattr(worker_state, "maybe_shutdown", lambda: looked() if bench.processes else None)
    bench.scripts = [loading, loading]
    with pytest.raises(WorkerShutdown):
        bench.pool.start()
    assert said[:10] == ["STARTING"] * 10
    assert said[-1] == "UNHEALTHY"


def test_a_worker_that_ended_in_order_has_no_state(started: Bench) -> None:
    started.until(lambda: health() == "READY")
    started.pool.terminate()
    assert not Path(os.environ["IDEFICS_STATE_FILE"]).exists()


# Defects of ours


def test_a_job_that_cannot_be_sent_ends_alone_and_frees_its_place(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sendable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if arguments[1] == "deep":
            raise RecursionError
        return arguments

    monkeypatch.setattr(lifecycle, "sendable", sendable)
    deep, good = started.submit("deep", "good")
    assert isinstance(deep.error, Internal)
    assert started.process.ran == ["good"]
    assert started.semaphore.releases == 1
    started.process.finish("good")
    started.until(lambda: good.kinds == ["success"])
    assert started.semaphore.releases == 2


def test_a_job_that_waited_and_cannot_be_sent_takes_no_other_along(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sendable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if arguments[1].startswith("deep"):
            raise MemoryError
        return arguments

    monkeypatch.setattr(lifecycle, "sendable", sendable)
    bench.start()
    bench.scripts.append(loading)
    bench.process.die()
    bench.until(lambda: len(bench.processes) == 2)
    requests = bench.submit("a", "deep-1", "b", "deep-2", "c")
    bench.process.say(Ready())
    bench.until(lambda: len(bench.process.ran) == 3)
    assert bench.process.ran == ["a", "b", "c"]
    assert [request.kinds for request in requests] == [[], ["failure"], [], ["failure"], []]
