"""The pool's life: it starts the model process, gives it jobs, hears of them, and replaces it when it dies."""

from __future__ import annotations

import functools
import itertools
import logging
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, TypeVar, assert_never

from billiard.exceptions import Terminated
from celery import bootsteps
from celery.concurrency import get_implementation
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks
from celery.exceptions import Reject, WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state
from kombu.asynchronous import get_event_loop
from kombu.asynchronous.hub import Hub
from kombu.common import ignore_errors

from config.settings import Settings
from config.settings import load as load_settings
from tasks.availability import is_away
from tasks.errors import DeadlineExceeded, Internal, WorkerLost
from worker.health import State, StateFile
from worker.pool import quarantine
from worker.pool.job import Callback, Callbacks, Job, JobState, is_redelivered, sendable
from worker.pool.launch import ModelProcess
from worker.pool.signals import DeferredSignals
from worker.pool.wire import (
    Abandon,
    Away,
    Broken,
    Cancel,
    Canceled,
    CannotServe,
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
    Waited,
    Withdrawn,
)
from worker.queue.load import Load
from worker.queue.pending_acks import has_pending_acks
from worker.queue.redeliveries import RedeliveryCounter
from worker.queue.servers import ServersCheck, servers
from worker.runtime.exit_watchdog import Held

logger = logging.getLogger(__name__)

#: Seconds between two looks at limits and signs of life.
TICK_S = 0.1
#: The part of IDEFICS_HANG_TIMEOUT_S after which a silent model process is unhealthy, and seconds that it may be
#: silent anyway: an idle one gives a sign of life each second.
UNHEALTHY_PART = 0.1
SILENT_S = 2.0
#: One for each time that a process that dies while it loads is started again: how many `restart_backoff_s` later.
RESTART_DELAYS = (1, 4, 16)
NEVER = float("inf")
HUNG = "The model process gave no sign of life: it is replaced and its jobs run again."
LOADS_TOO_LONG = (
    "The model did not load within IDEFICS_LOAD_TIMEOUT_S: its process is started again. Raise that where the download "
    "or the disk is slow, or fill the hub's cache first."
)
#: Seconds that a job has been here before it may go back for others.
KEPT_S = 0.5
#: Seconds that jobs which go back together wait for the last of them.
TOGETHER_S = 0.3
#: Seconds that a process which has no job left gets to leave by itself.
LEAVE_S = 5.0

F = TypeVar("F", bound=Callable[..., Any])


def _guarded(function: F) -> F:
    """A callback of the event loop that raises would end the worker's loop: log it and go on."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (WorkerShutdown, MemoryError):
            raise
        except Exception:
            logger.exception("A defect in %s; the worker goes on.", function.__name__)
            return None

    return call  # type: ignore[return-value]


class Returns:
    """Jobs that go back to their queue together, so that they keep their order."""

    def __init__(self) -> None:
        self._awaited: set[int] = set()
        self._since = 0.0
        self.returned: set[int] = set()

    @property
    def are_awaited(self) -> bool:
        return bool(self._awaited or self.returned)

    def begin(self, serials: Iterable[int], now: float) -> None:
        self._awaited.update(serials)
        self._since = now

    def are_complete(self, held: Container[int], now: float) -> bool:
        """Whether all have returned that are still held, or the others take long."""
        missing = [serial for serial in self._awaited if serial in held and serial not in self.returned]
        return self.are_awaited and (not missing or now - self._since > TOGETHER_S)

    def end(self) -> list[int]:
        """Those that have returned, the latest first."""
        returned, self.returned, self._awaited = self.returned, set(), set()
        return sorted(returned, reverse=True)


class InferencePool(BasePool):  # type: ignore[misc]
    """Many jobs in flight in one process that holds the model.

    Celery's semaphore lets `settings.job_threads` jobs in; the others wait in it, where revoke and expiry work.
    """

    uses_semaphore = True
    task_join_will_block = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._settings: Settings = load_settings()
        self._process: ModelProcess | None = None
        self._hub: Hub | None = None
        self._jobs: dict[int, Job] = {}
        self._serials = itertools.count()
        self._quarantine: deque[list[Job]] = deque()
        #: True while a group of suspects runs: nobody joins it.
        self._isolates = False
        self._failed_starts = 0
        self._has_been_ready = False
        self._start_at = 0.0
        self._ticked_at = time.monotonic()
        self._closing = False
        self._signals = DeferredSignals()
        self._is_writing = False
        #: The model's counters, as its process last told them.
        self._figures: Mapping[str, int] = {}
        #: As its process last told: jobs that could be under way, those that it runs at once, seconds that each takes,
        #: seconds that none may join those that run.
        self._capacity = self._settings.max_batch_size
        self._width, self._job_s, self._closed_s = float(self._settings.max_batch_size), 0.0, 0.0
        self._returns = Returns()
        #: Other workers would end what is queued before this one could (worker/queue/balance.py).
        self.leaves_to_others = False
        #: By serial, when they began: jobs that have ended by a limit of their own, and whose threads have not yet.
        self._overstaying: dict[int, float] = {}
        #: Set when the process is killed for a job that is known: its neighbours are above suspicion.
        self._culprit_is_known = False
        #: The consumer's too, which tells them the connection.
        self.deliveries = RedeliveryCounter(most=self._settings.max_deliveries)
        self._state_file = StateFile(self._settings.state_file, self._hostname)
        self._servers = ServersCheck(servers(self.app) if self.app else {})

    # Life cycle

    def on_start(self) -> None:
        """Block until the model and both Redis answer. Raises WorkerShutdown where one of them cannot be used."""
        self.options["semaphore"].grow(self._settings.job_threads - self.limit)
        self._signals.install()
        self._servers.start()
        try:
            while not (self._is_ready and self._servers.have_answered):
                worker_state.maybe_shutdown()
                self._wait(TICK_S)
        except BaseException:
            # Celery does not stop a pool whose start failed.
            self._servers.stop()
            self._leave()
            raise

    def register_with_event_loop(self, hub: Hub) -> None:
        """Called at every reconnect to the broker, with an empty event loop."""
        self._hub = hub
        self._is_writing = False
        hub.add_reader(self._signals.fileno(), self._signals.run)
        self._watch()
        hub.call_repeatedly(TICK_S, self._tick)

    def on_close(self) -> None:
        self._closing = True

    def on_stop(self) -> None:
        """Warm shutdown: what runs ends; what waits goes back to the queue."""
        # In a cold one the jobs have been told to end.
        self.drain(LEAVE_S if worker_state.should_terminate else float("inf"))
        self._leave(LEAVE_S)

    def drain(self, timeout: float = float("inf")) -> None:
        """Take no job any more, and wait for those that run, at most so many seconds."""
        self._closing = True
        self._hub_is_gone()
        end = time.monotonic() + timeout
        while self._is_ready and self._in_flight and time.monotonic() < end:
            self._wait(TICK_S)
            hub = get_event_loop()
            if hub is not None:
                hub.fire_timers()
                _run_ready_callbacks(hub)

    def on_terminate(self) -> None:
        """Cold shutdown: nothing is acknowledged, so every job goes back to the queue."""
        self._closing = True
        self._hub_is_gone()
        self._leave()

    def held(self) -> Held:
        """Asked by the exit watchdog's thread."""
        jobs = list(self._jobs.values())
        is_owed = bool(jobs or worker_state.reserved_requests or worker_state.scheduled_requests or has_pending_acks())
        return Held(any(job.state is not JobState.WAITING for job in jobs), is_owed)

    def abandon(self) -> None:
        """The process ends this moment, by the exit watchdog's thread."""
        if self._process is not None:
            self._process.kill()
        self._state_file.remove()

    def run_signals(self) -> None:
        """For who holds the main thread up: run the handlers of signals that have arrived, and raise what they do."""
        self._signals.run()

    def _leave(self, grace_s: float = 0.0) -> None:
        self._end_process(grace_s)
        self._give_back()
        self._signals.restore()
        self._state_file.remove()

    @_guarded
    def _give_back(self) -> None:
        """A stop in order is no death: what it ends was not started in vain."""
        jobs = self._in_flight
        self.deliveries.unmark_started([(job.key, job.returns) for job in jobs if job.returns])
        for job in jobs:
            job.state = JobState.WAITING

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Nothing: `pid` holds all jobs. Celery calls `terminate` of the very job next."""

    # Jobs

    @property
    def wants_jobs(self) -> bool:
        """Whether a job that came now would run. Else it is left in the queue: another worker may be idle."""
        return self._can_begin and not self.leaves_to_others

    @property
    def load(self) -> Load:
        """For the other workers, and to compare with theirs."""
        if not self._can_begin:
            return Load(1, NEVER, len(self._jobs), is_open=False)
        unbegun = len(self._jobs) - self._capacity
        # Hosts that hang may hold all places of a worker with nothing to run.
        may_take = unbegun >= 0 or len(self._jobs) < self._settings.job_threads
        return Load(self._width, self._job_s, unbegun, may_take and not self._closing, self._closed_s)

    @property
    def _can_begin(self) -> bool:
        return self._is_ready and not self._is_apart and not self._is_silent(time.monotonic())

    @_guarded
    def give_back(self, queue: str, most: int) -> None:
        """Put jobs that have not begun back into this queue: other workers would end them sooner."""
        now = time.monotonic()
        if self._returns.are_awaited:
            return
        jobs = [job for job in self._jobs.values() if self._may_go(job, queue, now)]
        waiting = [job.serial for job in jobs if job.state is JobState.WAITING][-most:]
        if waiting:
            self._returns.begin(waiting, now)
            self._returns.returned.update(waiting)
            self._hand_back(now)
        elif jobs and self._is_ready:
            self._send(GiveBack(most, [job.serial for job in jobs]))

    def _may_go(self, job: Job, queue: str, now: float) -> bool:
        return job.queue == queue and not job.is_suspect and not job.canceled and now - job.taken_at > KEPT_S

    def _hand_back(self, now: float) -> None:
        """Those that have returned, once all have that were to: in order, the first to be read again last."""
        if not self._returns.are_complete(self._jobs, now):
            return
        jobs = [job for job in map(self._jobs.get, self._returns.end()) if job is not None]
        self.deliveries.unmark_started([(job.key, job.returns) for job in jobs if job.returns])
        for job in jobs:
            self._finish(job, job.give_back)
        if jobs:
            logger.debug("%d jobs that had not begun are left to other workers.", len(jobs))

    @property
    def _is_apart(self) -> bool:
        """Suspects run."""
        return (self._isolates or bool(self._quarantine)) and bool(self._in_flight)

    def on_apply(
        self,
        target: Callback,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        callback: Callback,
        error_callback: Callback,
        accept_callback: Callback,
        timeout: float | None = None,
        **_: Any,
    ) -> Job | None:
        """Take a job, or None once closed: its message stays unacknowledged and goes back to the queue."""
        if self._closing:
            return None
        callbacks = Callbacks(accept_callback, callback, error_callback)
        job = Job(next(self._serials), tuple(args), callbacks, timeout, self._cancel)
        latest = next((other for other in reversed(self._jobs.values()) if other.key == job.key), None)
        if latest is not None and latest.asks_as(job):
            return self._adopt(latest, callbacks)
        self._jobs[job.serial] = job
        try:
            if is_redelivered(job.trace_arguments):
                self._suspect(job)
            self._dispatch()
        except BaseException:
            # It was not taken: whoever gave it here gives its place to another.
            self._jobs.pop(job.serial, None)
            raise
        return job

    @_guarded
    def _suspect(self, job: Job) -> None:
        """A worker that had this job may have died of it."""
        history = self.deliveries.history(job.key)
        job.returns, job.is_uncounted = history.returns, history.returns > 0
        job.is_suspect = self.deliveries.is_suspect(history.deaths)
        if self.deliveries.is_lost(history.deaths):
            error = WorkerLost(f"{history.deaths} workers died with this job: look at their logs for the reason.")
            self._finish(job, lambda: job.fail(error))
        elif job.is_suspect:
            self._quarantine.append([job])

    def _adopt(self, running: Job, callbacks: Callbacks) -> Job:
        """The broker delivered a message again whose job still runs here: one run answers both."""
        older, newer = running.callbacks.request, callbacks.request
        running.callbacks = callbacks
        if older is not None and newer is not None and older.message.delivery_tag != newer.message.delivery_tag:
            # The newer message stands for both; the older one would count as prefetched for ever. (Kombu's own
            # transport may deliver one again under its tag.)
            older.acknowledge()
        if running.accepted_at is not None and self._process is not None:
            callbacks.accept(self._process.pid, running.accepted_at)
        self.options["semaphore"].release()
        return running

    @_guarded
    def _cancel(self, job: Job) -> None:
        """A cancellation is of all jobs under its id."""
        for each in [other for other in self._jobs.values() if other.id == job.id]:
            self._cancel_one(each)

    def _cancel_one(self, job: Job) -> None:
        job.canceled = True
        if job.state is JobState.WAITING:
            self._finish(job, lambda: job.fail(Terminated("canceled")))
            self._dispatch()
        elif self._process is not None:
            self._send(Cancel(job.serial))

    def _dispatch(self) -> None:
        """Send what may run now: everything, or after a death one group of suspects after the other."""
        if self._closing or not self._is_ready or self._is_apart:
            return
        suspects = self._next_suspects()
        self._isolates = bool(suspects)
        self._run(suspects or self._next_jobs())

    def _next_jobs(self) -> list[Job]:
        """All that wait, but of different jobs under one id the first: the model process knows jobs by their ids."""
        firsts: dict[str, Job] = {}
        for job in self._jobs.values():
            firsts.setdefault(job.id, job)
        return [job for job in firsts.values() if job.state is JobState.WAITING]

    def _next_suspects(self) -> list[Job]:
        while self._quarantine:
            group = [job for job in self._quarantine.popleft() if job.serial in self._jobs]
            if group:
                return group
        return []

    def _run(self, jobs: list[Job]) -> None:
        self.deliveries.mark_started([(job.key, job.returns) for job in jobs if job.is_uncounted])
        for job in jobs:
            # One that cannot be sent ends, and lets others in that are sent at once.
            if job.state is JobState.WAITING and job.serial in self._jobs:
                job.is_uncounted = False
                self._start(job)

    def _start(self, job: Job) -> None:
        try:
            self._send(Run(job.serial, sendable(job.trace_arguments)))
            job.state = JobState.SENT
        except Exception as defect:
            # Of this job: its neighbours are to run.
            logger.exception("A defect: job %s cannot be sent to the model process.", ascii(job.id))
            error = Internal(f"{type(defect).__name__} in the worker: its log has the traceback.")
            self._finish(job, lambda: job.fail(error))

    def _finish(self, job: Job, report: Callable[[], None]) -> None:
        """Give a job's outcome to Celery and its place to the next one, once."""
        if self._jobs.pop(job.serial, None) is None:
            return
        try:
            report()
        except MemoryError:
            raise
        except Exception as error:
            self._give_up_telling(job, error)
        finally:
            if not self._closing:
                self.options["semaphore"].release()

    def _give_up_telling(self, job: Job, error: Exception) -> None:
        """A defect would be there the next time too: its job comes again as often as one whose worker dies."""
        again = is_away(error) or self._may_return(job)
        what = "goes back to the queue" if again else "is dropped"
        logger.error("The outcome of job %s could not be told: it %s.", job.id, what, exc_info=error)
        job.fail(Reject("its outcome could not be stored", requeue=again))

    def _may_return(self, job: Job) -> bool:
        """Count that a job goes back for another reason than Redis's absence; False where it did so too often."""
        self.deliveries.count_return(job.key)
        return not self.deliveries.is_lost(self.deliveries.history(job.key).deaths)

    @property
    def _in_flight(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.state is not JobState.WAITING]

    # The model process

    @property
    def _is_ready(self) -> bool:
        return self._process is not None and self._process.is_ready

    def _wait(self, timeout: float) -> None:
        """One turn without an event loop."""
        readers: list[Any] = [self._signals]
        writers: list[Any] = []
        if self._process is not None:
            readers.append(self._process.channel)
            writers += [self._process.channel] if self._process.channel.has_unsent else []
        select.select(readers, writers, [], timeout)
        self._signals.run()
        self._on_readable()
        self._tick()

    @property
    def _hostname(self) -> str:
        return str(self.options.get("initargs", (None, "celery"))[1])

    @_guarded
    def _tick(self) -> None:
        now = time.monotonic()
        self._catch_up(now)
        self._on_readable()
        self._state_file.show(*self._health(now))
        if self._servers.wrong and self._start_at != NEVER:
            logger.critical("%s The worker stops.", self._servers.wrong)
            self._give_up(self._servers.wrong)
        if self._process is None:
            if now >= self._start_at and not self._closing:
                self._start_process()
            return
        self._process.channel.flush()
        self._hand_back(now)
        for job in self._overdue(now):
            self._end_overdue(job)
        # A producer may set a limit of its own, and must not have the model loaded again for it.
        stuck = [began for began in self._overstaying.values() if now - began > self._settings.time_limit_s]
        if stuck:
            logger.warning("%d jobs passed IDEFICS_TIME_LIMIT_S: the model process is replaced.", len(stuck))
            self._culprit_is_known = True
            self._process.kill()
        elif self._is_hung(now):
            logger.error(HUNG if self._is_ready else LOADS_TOO_LONG)
            self._process.kill()

    def _overdue(self, now: float) -> list[Job]:
        # As in `_on_broken`: such a job comes again.
        return [job for job in self._jobs.values() if job.is_overdue(now) and not worker_state.should_terminate]

    def _end_overdue(self, job: Job) -> None:
        error = DeadlineExceeded(f"The job ran for more than its limit of {job.hard_limit} s and was ended.")
        self._finish(job, functools.partial(job.fail, error))
        self._overstaying[job.serial] = job.accepted_at or 0.0
        self._send(Abandon(job.serial))
        self._dispatch()

    def _catch_up(self, now: float) -> None:
        """A broker that hangs holds this process up, a paused container both: what nobody heard was no silence."""
        missed, self._ticked_at = now - self._ticked_at, now
        if missed > self._silent_s and self._process is not None:
            self._process.last_sign = min(now, self._process.last_sign + missed)

    @property
    def _silent_s(self) -> float:
        return max(SILENT_S, UNHEALTHY_PART * self._settings.hang_timeout_s)

    def _is_silent(self, now: float) -> bool:
        assert self._process is not None
        return now - self._process.last_sign > self._silent_s

    def _is_hung(self, now: float) -> bool:
        assert self._process is not None
        if self._process.is_ready:
            return now - self._process.last_sign > self._settings.hang_timeout_s
        return now - self._process.started_at > self._settings.load_timeout_s

    def _start_process(self) -> None:
        logger.info("Loading %s in a model process.", self._settings.model)
        self._process = ModelProcess(self._hostname)
        self._watch()

    def _watch(self) -> None:
        if self._hub is not None and self._process is not None:
            self._hub.add_reader(self._process.channel.fileno(), self._on_readable)

    def _hub_is_gone(self) -> None:
        """From here on `_wait` reads."""
        self._unwatch()
        if self._hub is not None:
            self._hub.remove(self._signals.fileno())
        self._hub = None

    def _unwatch(self) -> None:
        if self._hub is not None and self._process is not None:
            self._hub.remove(self._process.channel.fileno())
            self._hub.remove(self._process.write_fd)
        self._is_writing = False

    def _send(self, message: ToModelProcess) -> None:
        assert self._process is not None
        self._process.channel.send(message)
        if self._hub is not None and self._process.channel.has_unsent and not self._is_writing:
            self._is_writing = True
            self._hub.add_writer(self._process.write_fd, self._on_writable)

    @_guarded
    def _on_writable(self) -> None:
        if self._process is None:
            return
        self._process.channel.flush()
        if not self._process.channel.has_unsent and self._hub is not None:
            self._hub.remove_writer(self._process.write_fd)
            self._is_writing = False

    @_guarded
    def _on_readable(self) -> None:
        if self._process is None:
            return
        messages, closed = self._process.receive()
        for message in messages:
            self._hear(message)
        if closed:
            self._on_death()

    @_guarded
    def _hear(self, message: FromModelProcess) -> None:
        match message:
            case Started(serial, at):
                self._on_started(serial, at)
            case Done(serial, outcome):
                self._on_done(serial, outcome)
            case Heartbeat():
                self._on_heartbeat(message)
            case Raised(serial, info):
                self._on_raised(serial, info)
            case Waited(serial, seconds):
                self._on_waited(serial, seconds)
            case Away(serial):
                self._on_away(serial)
            case Broken(serial, reason):
                self._on_broken(serial, reason)
            case Canceled(serial, partial):
                self._on_canceled(serial, partial)
            case Withdrawn(serials):
                self._returns.begin(serials, time.monotonic())
            case Returned(serial):
                self._on_returned(serial)
            case Ready():
                self._on_ready()
            case CannotServe(reason):
                self._on_cannot_serve(reason)
            case _:
                assert_never(message)

    # What the model process says

    def _on_ready(self) -> None:
        assert self._process is not None
        self._process.is_ready = True
        self._process.last_sign = time.monotonic()
        self._has_been_ready = True
        self._failed_starts = 0
        self._capacity, self._job_s, self._closed_s = self._settings.max_batch_size, 0.0, 0.0
        seconds = time.monotonic() - self._process.started_at
        logger.info("The model is ready after %.1f s (process %d).", seconds, self._process.pid)
        self._dispatch()

    def _on_cannot_serve(self, reason: str) -> None:
        logger.critical("The model cannot be served: %s The worker stops.", reason)
        self._give_up(reason)

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Only the engine's counts: job threads go on beside an engine that is stuck."""
        assert self._process is not None
        self._process.last_sign = time.monotonic()
        self._figures = heartbeat.metrics
        self._capacity, self._width = heartbeat.capacity, heartbeat.width
        self._job_s, self._closed_s = heartbeat.job_s, heartbeat.closed_s

    def _on_returned(self, serial: int) -> None:
        job = self._jobs.get(serial)
        if job is None or job.canceled:
            self._on_canceled(serial, None)
            return
        self._returns.returned.add(serial)
        self._hand_back(time.monotonic())

    def _on_started(self, serial: int, at: float) -> None:
        job = self._jobs.get(serial)
        if job is not None and self._process is not None:
            job.accept(self._process.pid, at)

    def _on_done(self, serial: int, outcome: tuple[Any, ...]) -> None:
        """The task ran: its result, failure or retry is stored; Celery acknowledges."""
        self._end_job(serial, lambda job: job.callbacks.success(outcome))

    def _on_raised(self, serial: int, info: Any) -> None:
        """The task ended outside of what Celery's tracer stores: a rejection."""
        rejection = getattr(info.exception, "exc", info.exception)

        def report(job: Job) -> None:
            if getattr(rejection, "requeue", False) and not self._may_return(job):
                job.fail(Internal("The job came back too often: the worker's log says for what."))
            else:
                job.callbacks.failure(info)

        self._end_job(serial, report)

    def _on_waited(self, serial: int, seconds: float) -> None:
        job = self._jobs.get(serial)
        if job is not None:
            job.waited_s += seconds

    def _on_away(self, serial: int) -> None:
        """Redis is away for longer than a job waits. That is no fault of the job's."""
        job = self._jobs.get(serial)
        if job is not None and job.returns:
            self.deliveries.unmark_started([(job.key, job.returns)])
        self._end_job(serial, lambda job: job.fail(Reject("Redis is away", requeue=True)))

    def _on_broken(self, serial: int, message: str) -> None:
        """The task ended outside of Celery's tracer by a defect."""
        # In a cold shutdown Celery would acknowledge a failure and not store it.
        error = Reject(message, requeue=True) if worker_state.should_terminate else Internal(message)
        self._end_job(serial, lambda job: job.fail(error))

    def _on_canceled(self, serial: int, partial: dict[str, Any] | None) -> None:
        def report(job: Job) -> None:
            job.partial = partial
            # Celery would acknowledge an Ignore; Terminated leaves that to its revocation.
            job.fail(Terminated("canceled"))

        self._end_job(serial, report)

    def _end_job(self, serial: int, report: Callable[[Job], None]) -> None:
        self._overstaying.pop(serial, None)
        job = self._jobs.get(serial)
        if job is not None:
            self._finish(job, lambda: report(job))
        self._dispatch()

    # Death

    def _on_death(self) -> None:
        assert self._process is not None
        was_ready = self._process.is_ready
        status = self._end_process(LEAVE_S)
        if self._closing:
            return
        suspects = self._in_flight
        logger.error("The model process ended with status %s; %d jobs run again.", status, len(suspects))
        self._plan_again(suspects)
        self._plan_start(was_ready)

    def _plan_again(self, suspects: list[Job]) -> None:
        known, self._culprit_is_known = self._culprit_is_known, False
        for job in [job for job in suspects if job.canceled]:
            suspects.remove(job)
            self._finish(job, functools.partial(job.fail, Terminated("canceled")))
        for job in suspects:
            job.run_again()
        if known:
            return
        if len(suspects) == 1 and self._died_alone(suspects[0]):
            return
        self._quarantine.extendleft(reversed(quarantine.groups(suspects)))

    def _died_alone(self, job: Job) -> bool:
        job.deaths += 1
        if job.deaths < quarantine.MAX_DEATHS_ALONE:
            return False
        self._finish(job, lambda: job.fail(WorkerLost()))
        return True

    def _plan_start(self, was_ready: bool) -> None:
        if self._start_at == NEVER:
            return
        if was_ready:
            self._start_at = time.monotonic()
            return
        if self._failed_starts >= len(RESTART_DELAYS):
            logger.critical(
                "The model process died %d times while loading: its last words are above; a status of -9 without any "
                "is the kernel's, for want of memory. The worker stops.",
                self._failed_starts + 1,
            )
            self._give_up("its process died each time while loading: look at the log")
            return
        delay = RESTART_DELAYS[self._failed_starts] * self._settings.restart_backoff_s
        self._start_at = time.monotonic() + delay
        self._failed_starts += 1

    def _give_up(self, why: str) -> None:
        self._start_at = NEVER
        self._state_file.show(State.SETUP_FAILED, why)
        worker_state.should_stop = EX_FAILURE

    def _end_process(self, grace_s: float = 0.0) -> int | None:
        if self._process is None:
            return None
        self._unwatch()
        if self._process.is_ready and grace_s:
            self._process.channel.send(Stop())
        status = self._process.end(grace_s)
        self._process.close()
        self._process = None
        self._returns.end()
        self._overstaying.clear()
        return status

    def _health(self, now: float) -> tuple[State, str]:
        """For the state file."""
        if not self._servers.have_answered:
            return State.STARTING, f"Redis is waited for. {self._servers.missing}"
        if self._is_ready and self._process is not None:
            if self._is_silent(now):
                silent, limit = now - self._process.last_sign, self._settings.hang_timeout_s
                return State.UNHEALTHY, f"its model process is silent for {silent:.0f} s; at {limit:g} it is replaced"
            is_full = self._closing or len(self._jobs) >= self._settings.job_threads
            return (State.BUSY if is_full else State.READY), f"{len(self._jobs)} jobs"
        if self._has_been_ready or self._failed_starts:
            return State.UNHEALTHY, "its model process died; the next one loads"
        return State.STARTING, ""

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "max-concurrency": self._settings.job_threads,
            "processes": [self._process.pid] if self._process else [],
            "ready": self._is_ready,
            "in-flight": len(self._in_flight),
            "model": self._figures,
        }


def refuse_other_pools(worker: Any) -> None:
    """End the start of a worker whose pool `-P` selects: it would hold no model and ignore all limits.

    Before Celery makes that pool, which may have processes by then.
    """
    pool = get_implementation(worker.pool_cls)
    if not issubclass(pool, InferencePool):
        sys.exit(
            f"Start the worker without -P (--pool): the model needs worker.pool:InferencePool, and {pool.__module__} "
            "holds none. How many jobs run at once is IDEFICS_MAX_BATCH_SIZE; callbacks have a worker of their own, "
            "worker.callbacks."
        )
    if worker.options.get("autoscale"):
        sys.exit("Start the worker without --autoscale: one process holds the model. Add workers instead.")


class SoftShutdown(bootsteps.StartStopStep):  # type: ignore[misc]
    """Celery's soft shutdown sleeps out its whole time; ours is over when the last running job is."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        timeout = worker.app.conf.worker_soft_shutdown_timeout
        worker.wait_for_soft_shutdown = functools.partial(self._shut_down, worker, timeout)

    def _shut_down(self, worker: Any, timeout: float) -> None:
        # First of all: jobs that come meanwhile are for others, and would wait here.
        if worker.consumer.task_consumer:
            ignore_errors(worker.consumer, worker.consumer.task_consumer.cancel)
        worker.pool.drain(timeout)
