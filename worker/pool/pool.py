"""Celery's pool API for one model process: the worker starts, feeds, inspects and stops the pool here.

The parts: `dispatcher` decides which jobs run, `lifecycle` moves them through their states, `completion` reports their
ends to Celery, `supervisor` keeps the model process alive, `time_limits` ends jobs that run for too long, `parking`
keeps jobs that wait for images' hosts, and `load_sharing` returns jobs for other workers.
"""

from __future__ import annotations

import itertools
import logging
import select
import time
from collections.abc import Callable
from typing import Any

from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state
from kombu.asynchronous import get_event_loop
from kombu.asynchronous.hub import Hub

from config.settings import Settings
from worker.health import StateFile, WorkerState
from worker.pool.completion import JobCompletion
from worker.pool.defects import log_defects
from worker.pool.dispatcher import Dispatcher
from worker.pool.job import JobState, PoolJob, RequestCallback, RequestCallbacks
from worker.pool.launch import ModelProcess
from worker.pool.lifecycle import JobLifecycle
from worker.pool.load_sharing import LoadSharing
from worker.pool.parking import Parking
from worker.pool.signals import DeferredSignals
from worker.pool.state_report import HeldJobs, StateReport
from worker.pool.supervisor import LEAVE_S, Supervisor
from worker.pool.time_limits import TimeLimits
from worker.queue.load_estimates import Load
from worker.queue.pending_acks import has_pending_acks
from worker.queue.redeliveries import RedeliveryCounter
from worker.queue.redis_check import RedisCheck, redis_pings
from worker.runtime.exit_watchdog import HeldWork

logger = logging.getLogger(__name__)

#: Seconds between two checks of limits and heartbeats.
TICK_S = 0.1


class InferencePool(BasePool):  # type: ignore[misc]
    """Many jobs in flight in one process that holds the model.

    Celery's semaphore lets `settings.job_threads` jobs in; the others wait in it, where revoke and expiry work.
    """

    uses_semaphore = True
    task_join_will_block = True

    def __init__(
        self,
        *args: Any,
        settings: Settings | None = None,
        redeliveries: RedeliveryCounter | None = None,
        launch: Callable[[str], ModelProcess] = ModelProcess,
        **options: Any,
    ) -> None:
        """`args` and `options` are Celery's, the others are for tests. `launch` starts a model process for a node."""
        super().__init__(*args, **options)
        self._settings: Settings = settings or self.app.settings
        #: The consumer uses it too, and sets its channel.
        self.redeliveries = redeliveries or RedeliveryCounter(most=self._settings.max_worker_deaths)
        #: Set while other workers would end the queued jobs before this one could (worker/queue/load_balancing.py).
        self.leaves_to_others = False
        hostname = str(options.get("initargs", (None, "celery"))[1])
        self._state_file = StateFile(self._settings.state_file, hostname)
        self._redis_check = RedisCheck(redis_pings(self.app) if self.app else {})
        self._signals, self._serials = DeferredSignals(), itertools.count()
        self._hub: Hub | None = None
        self._process = Supervisor(self._settings, hostname, self._stop_worker, launch)
        self._set_up_parts(self._settings)

    def _set_up_parts(self, settings: Settings) -> None:
        self._jobs = Dispatcher()
        self.parking = Parking(self.options["semaphore"])
        completion = JobCompletion(self._jobs, self.redeliveries, self.parking)
        self._limits = TimeLimits(self._jobs, completion, self._process, settings.time_limit_s)
        self.sharing = LoadSharing(self._jobs, self.parking, completion, self._process, settings)
        self._lifecycle = JobLifecycle(
            self._jobs, completion, self._process, self._limits, self.sharing, self.redeliveries, self.parking
        )
        self._process.listen(self._lifecycle)
        held = HeldJobs(self._jobs, self.parking, settings.job_threads)
        self._report = StateReport(self._state_file, self._redis_check, self._process, held)

    # Life cycle

    def on_start(self) -> None:
        """Block until the model and both Redis answer. Raises WorkerShutdown where one of them cannot be used."""
        self.options["semaphore"].grow(self._settings.job_threads - self.limit)
        self._signals.install()
        self._redis_check.start()
        try:
            while not (self._process.is_ready and self._redis_check.have_answered):
                worker_state.maybe_shutdown()
                self._wait(TICK_S)
        except BaseException:
            # Celery does not stop a pool whose start failed.
            self._redis_check.stop()
            self._leave()
            raise

    def register_with_event_loop(self, hub: Hub) -> None:
        """Use this event loop. Celery calls it with an empty loop at every reconnect to the broker."""
        self._hub = hub
        hub.add_reader(self._signals.fileno(), self._signals.run)
        self._process.watch(hub)
        hub.call_repeatedly(TICK_S, self._tick)

    def on_close(self) -> None:
        self._jobs.is_closed = True
        self._process.close()

    def on_stop(self) -> None:
        """Warm shutdown: running jobs end, waiting jobs return to the queue."""
        # In a cold shutdown the jobs have been told to end.
        self.drain(LEAVE_S if worker_state.should_terminate else float("inf"))
        self._leave(LEAVE_S)

    def drain(self, timeout: float = float("inf")) -> None:
        """Take no more jobs, and wait up to `timeout` seconds for the running ones."""
        self._close_and_unwatch()
        end = time.monotonic() + timeout
        while self._process.is_ready and self._jobs.in_flight and time.monotonic() < end:
            self._wait(TICK_S)
            _run_timers(get_event_loop())

    def on_terminate(self) -> None:
        """Cold shutdown: nothing is acknowledged, so every job goes back to the queue."""
        self._close_and_unwatch()
        self._leave()

    def _close_and_unwatch(self) -> None:
        """Take no more jobs; from here on `_wait` reads instead of the event loop."""
        self.on_close()
        self._process.unwatch()
        if self._hub is not None:
            self._hub.remove(self._signals.fileno())
        self._hub = None

    def _leave(self, grace_s: float = 0.0) -> None:
        self._process.end(grace_s)
        self._lifecycle.leave_unended()
        self._signals.restore()
        self._state_file.remove()

    def _stop_worker(self, why: str) -> None:
        self._state_file.show(WorkerState.SETUP_FAILED, why)
        worker_state.should_stop = EX_FAILURE

    # Jobs, and the worker's questions

    def on_apply(
        self,
        target: RequestCallback,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        callback: RequestCallback,
        error_callback: RequestCallback,
        accept_callback: RequestCallback,
        timeout: float | None = None,
        **_: Any,
    ) -> PoolJob | None:
        """Take a job. None once closed: its message stays unacknowledged and returns to the queue."""
        if self._jobs.is_closed:
            return None
        callbacks = RequestCallbacks(accept_callback, callback, error_callback)
        job = PoolJob(next(self._serials), tuple(args), callbacks, timeout, self._lifecycle.cancel)
        return self._lifecycle.admit(job)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Do nothing: the process holds all jobs. Celery then calls `terminate` of the job."""

    @property
    def can_accept_jobs(self) -> bool:
        """Whether a job that came now would run here. Otherwise it stays in the queue: another worker may be idle."""
        return self._can_begin and not self.leaves_to_others and not self.sharing.has_just_shared

    @property
    def load(self) -> Load:
        """This worker's load, for comparison with other workers."""
        return self.sharing.load(can_begin=self._can_begin)

    @property
    def _can_begin(self) -> bool:
        return self._process.can_answer(time.monotonic()) and not self._jobs.is_isolated

    def give_back(self, queue: str, most: int) -> None:
        """Put up to `most` jobs that have not begun back into this queue, for other workers."""
        self.sharing.give_back(queue, most)

    def run_signals(self) -> None:
        """Run the handlers of pending signals, for code that blocks the event loop. Raises what they raise."""
        self._signals.run()

    def held(self) -> HeldWork:
        """The work that is not done. Called by the exit watchdog's thread."""
        jobs = list(self._jobs)
        has_messages = jobs or worker_state.reserved_requests or worker_state.scheduled_requests or has_pending_acks()
        return HeldWork(any(job.state is not JobState.WAITING for job in jobs), bool(has_messages))

    def abandon(self) -> None:
        """Kill the model process and remove the state file, before this process ends. Called by the exit watchdog."""
        self._process.kill()
        self._state_file.remove()

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "max-concurrency": self._settings.job_threads,
            "processes": [self._process.pid] if self._process.pid is not None else [],
            "ready": self._process.is_ready,
            "in-flight": len(self._jobs.in_flight),
            "model": self.sharing.metrics,
        }

    # The tick

    def _wait(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for a signal or a message, without an event loop, and handle both."""
        readers, writers = self._process.descriptors()
        select.select([self._signals, *readers], writers, [], timeout)
        self._signals.run()
        self._process.receive()
        self._tick()

    @log_defects
    def _tick(self) -> None:
        now = time.monotonic()
        # Messages first: a job whose end has arrived has kept its limit.
        self._process.hear(now)
        self._report.renew(now)
        if self._redis_check.wrong and not self._process.has_given_up:
            logger.critical("%s The worker stops.", self._redis_check.wrong)
            self._process.give_up(self._redis_check.wrong)
        if self._process.maintain(now):
            self.sharing.hand_back(now)
            if not self._lifecycle.enforce_limits(now):
                self._process.replace_if_hung(now)


def _run_timers(hub: Hub | None) -> None:
    """Run the due timers of Celery's event loop, which no longer runs itself."""
    if hub is not None:
        hub.fire_timers()
        _run_ready_callbacks(hub)
