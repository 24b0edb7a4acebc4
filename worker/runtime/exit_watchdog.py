"""The exit watchdog ends a worker in time when it is asked to stop, even if Redis does not answer.

Celery stops in its main thread, which may wait there for a Redis that is frozen, loads its data or cannot be reached:
30 seconds in each of several calls. The watchdog's thread receives the same signals, through the descriptor that
Python's signal handler writes to, and ends the process if the main thread does not. Then acknowledgements that the
broker did not receive, and messages that the worker held, are given up: they are delivered again after the visibility
timeout, and jobs that had ended are found to have ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from celery import bootsteps
from celery.platforms import EX_FAILURE, EX_OK
from kombu import Connection

logger = logging.getLogger(__name__)

#: Seconds for the main thread to end by itself once no job runs.
GRACE_S = 1.2
#: The same if the broker answers and messages must be returned to it: a slow machine may have thousands.
OWED_S = 15.0
#: Seconds between two checks of the running work, and for the broker's answer.
TICK_S = 0.1
ANSWER_S = 0.5


@dataclass(frozen=True, slots=True)
class HeldWork:
    """The work that a worker has not finished."""

    #: Whether work runs that a stop waits for.
    is_running: bool
    #: Whether messages must be acknowledged or returned to the broker.
    has_messages: bool


class StopRequest:
    """Which stop was requested, and when it is overdue. Pure: its caller passes the time."""

    def __init__(self, soft_s: float, *, is_remapped: bool) -> None:
        """`soft_s`: seconds that a cold stop waits for running work. `is_remapped`: SIGTERM means SIGQUIT."""
        self._soft_s = soft_s
        self._is_remapped = is_remapped
        self._interrupts = 0
        self._quiet_since = float("inf")
        #: When a cold stop stops waiting.
        self._ends_at = float("inf")
        self.exit_code = EX_OK

    @property
    def is_asked(self) -> bool:
        return self._quiet_since != float("inf")

    def hear(self, number: int, now: float) -> None:
        if number not in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            return
        self._interrupts += number == signal.SIGINT
        is_cold = number == signal.SIGQUIT or self._interrupts > 1 or (number == signal.SIGTERM and self._is_remapped)
        if not self.is_asked:
            self._quiet_since = now
        if is_cold:
            # Requested twice, it waits no longer.
            wait_s = self._soft_s if self._ends_at == float("inf") else 0.0
            self._ends_at = min(self._ends_at, now + wait_s)
        if number != signal.SIGTERM or self._is_remapped:
            self.exit_code = EX_FAILURE

    def see(self, held: HeldWork, now: float) -> None:
        if held.is_running and self.is_asked:
            self._quiet_since = now

    def overdue_s(self, now: float) -> float:
        """Seconds since the stop has nothing left to wait for; negative before that."""
        return now - min(self._quiet_since, self._ends_at)


class ExitWatchdog(threading.Thread):
    """Ends the process. Started in the main thread, once."""

    def __init__(
        self, stop: StopRequest, held: Callable[[], HeldWork], answers: Callable[[], bool], abandon: Callable[[], None]
    ) -> None:
        """`answers`: whether the broker answers. `abandon` is called before the process ends."""
        super().__init__(name="exit-watchdog", daemon=True)
        self._stop_asked = stop
        self._held = held
        self._answers = answers
        self._abandon = abandon
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._read_fd, True)

    def watch(self) -> None:
        # Python's handler in C writes to it even while the main thread is blocked.
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self.start()

    def run(self) -> None:
        while not self._stop_asked.is_asked:
            self._hear()
        os.set_blocking(self._read_fd, False)
        while not self._is_overdue():
            time.sleep(TICK_S)
            self._hear()
        self._end()

    def _hear(self) -> None:
        try:
            for number in os.read(self._read_fd, 64):
                self._stop_asked.hear(number, time.monotonic())
        except BlockingIOError:
            return

    def _is_overdue(self) -> bool:
        now = time.monotonic()
        held = self._held()
        self._stop_asked.see(held, now)
        overdue_s = self._stop_asked.overdue_s(now)
        if overdue_s >= OWED_S or not held.has_messages:
            return overdue_s >= GRACE_S
        # Submission early enough that a broker which does not answer delays nothing.
        return overdue_s >= GRACE_S - 2 * ANSWER_S and not self._answers()

    def _end(self) -> NoReturn:
        try:
            logger.warning(
                "The worker was asked to stop and waits for Redis: it ends now. Messages that it could not acknowledge "
                "or give back are delivered again after IDEFICS_VISIBILITY_TIMEOUT_S."
            )
            self._abandon()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(self._stop_asked.exit_code)


def answers_soon(connect: Callable[[], Connection]) -> bool:
    """Whether a broker answers within ANSWER_S. Submission in another thread: the name service may take longer."""
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(_answers(connect)), daemon=True, name="asks-the-broker")
    asking.start()
    asking.join(2 * ANSWER_S)
    return bool(found and found[0])


def _answers(connect: Callable[[], Connection]) -> bool:
    try:
        connection = connect()
        try:
            # A channel's constructor sends PING.
            connection.channel().close()
            return True
        finally:
            connection.release()
    except Exception:
        return False


class ExitInTime(bootsteps.StartStopStep):  # type: ignore[misc]
    """The watchdog's bootstep. A subclass says what is held, and what to do before the end."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        conf = worker.app.conf
        # As celery.platforms reads it.
        is_remapped = os.environ.get("REMAP_SIGTERM") == "SIGQUIT"
        options = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S}

        def connect() -> Connection:
            known = {**conf.broker_transport_options, **options}
            return worker.app.connection_for_read(connect_timeout=ANSWER_S, transport_options=known)

        ExitWatchdog(
            StopRequest(conf.worker_soft_shutdown_timeout, is_remapped=is_remapped),
            held=lambda: self.held(worker),
            answers=lambda: answers_soon(connect),
            abandon=lambda: self.abandon(worker),
        ).watch()

    def held(self, worker: Any) -> HeldWork:
        raise NotImplementedError

    def abandon(self, worker: Any) -> None:
        """Do nothing: a worker without processes and files leaves nothing behind."""
