"""Supervision of the model process: start, heartbeats, hangs, restarts.

What happens to the jobs of a process that died: `worker/pool/lifecycle.py` hears of the death, and
`worker/pool/quarantine.py` plans what runs again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

from kombu.asynchronous.hub import Hub

from config.settings import Settings
from worker.health import WorkerState
from worker.observability.exposition import MODEL_PROCESS
from worker.observability.metrics import RESTARTS
from worker.pool.defects import log_defects
from worker.pool.launch import ModelProcess
from worker.pool.process_io import ProcessIO
from worker.pool.wire import (
    DEVICE_LOST,
    CannotServe,
    FromModelProcess,
    Heartbeat,
    JobMessage,
    Metrics,
    Ready,
    Stop,
    ToModelProcess,
)

logger = logging.getLogger(__name__)

#: A model process is unhealthy if it is silent for this share of IDEFICS_HANG_TIMEOUT_S, but at least for SILENT_S
#: seconds: an idle process sends a heartbeat each second.
UNHEALTHY_PART = 0.1
SILENT_S = 2.0
#: Delays of the restarts after a process died while loading, in units of `restart_backoff_s`.
RESTART_DELAYS = (1, 4, 16)
#: Seconds that a process gets to exit by itself.
LEAVE_S = 5.0
HUNG = "The model process sent no heartbeat: it is replaced and its jobs run again."
LOADS_TOO_LONG = (
    "The model did not load within IDEFICS_LOAD_TIMEOUT_S: its process is started again. Raise that where the download "
    "or the disk is slow, or fill the hub's cache first."
)
DIED_LOADING = (
    "The model process died %d times while loading: its output is above. A status of -9 without output means that the "
    "kernel killed it because memory ran out. The worker stops."
)
NEVER = float("inf")


class RestartSchedule:
    """When the next process starts. Pure: its caller passes the time."""

    def __init__(self, backoff_s: float) -> None:
        self._backoff_s = backoff_s
        self._start_at = 0.0
        #: Consecutive deaths while loading.
        self.failures = 0

    @property
    def is_over(self) -> bool:
        return self._start_at == NEVER

    def is_due(self, now: float) -> bool:
        return now >= self._start_at

    def loaded(self) -> None:
        self.failures = 0

    def died(self, now: float, *, was_ready: bool) -> bool:
        """Plan the next start: at once after a process that was ready. False after too many failures."""
        if self.is_over:
            return True
        if was_ready:
            self._start_at = now
            return True
        if self.failures >= len(RESTART_DELAYS):
            return False
        self._start_at = now + RESTART_DELAYS[self.failures] * self._backoff_s
        self.failures += 1
        return True

    def end(self) -> None:
        """Start no more processes."""
        self._start_at = NEVER


class Listener(Protocol):
    """Receives the model process's events."""

    def process_started(self) -> None:
        """The model is ready."""

    def heard(self, message: Heartbeat | JobMessage) -> None: ...

    def process_ended(self, status: int) -> None:
        """The process died, or was killed because it hung."""


class Supervisor:
    """Keeps one model process running, and has its messages handled."""

    def __init__(
        self,
        settings: Settings,
        hostname: str,
        give_up: Callable[[str], None],
        launch: Callable[[str], ModelProcess] = ModelProcess,
    ) -> None:
        """`give_up` stops the worker with a reason. `launch` starts a process for a node."""
        self._settings = settings
        self._hostname = hostname
        self._on_give_up = give_up
        self._launch = launch
        self._listener: Listener | None = None
        self._process: ModelProcess | None = None
        self._restarts = RestartSchedule(settings.restart_backoff_s)
        self._has_been_ready = False
        self._is_closed = False
        self._killed_because = ""  # a label of RESTARTS
        self._heard_at = time.monotonic()
        self._io = ProcessIO(self.receive)

    def listen(self, listener: Listener) -> None:
        """Set the receiver of events, before the first process starts."""
        self._listener = listener

    # State

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def is_ready(self) -> bool:
        return self._process is not None and self._process.is_ready

    def can_answer(self, now: float) -> bool:
        """Whether the process is ready and sends heartbeats."""
        return self._process is not None and self._process.is_ready and not self._is_silent(self._process, now)

    @property
    def has_given_up(self) -> bool:
        return self._restarts.is_over

    def state(self, now: float) -> tuple[WorkerState, str]:
        """The state for the worker's state file, and the reason for it."""
        process = self._process
        if process is not None and process.is_ready:
            if not self._is_silent(process, now):
                return WorkerState.READY, ""
            silent, limit = now - process.last_heartbeat, self._settings.hang_timeout_s
            return WorkerState.UNHEALTHY, f"its model process is silent for {silent:.0f} s; at {limit:g} it is replaced"
        if self._has_been_ready or self._restarts.failures:
            return WorkerState.UNHEALTHY, "its model process died; the next one loads"
        return WorkerState.STARTING, ""

    def _is_silent(self, process: ModelProcess, now: float) -> bool:
        return now - process.last_heartbeat > self._silent_s

    @property
    def _silent_s(self) -> float:
        return max(SILENT_S, UNHEALTHY_PART * self._settings.hang_timeout_s)

    # Start and end

    def maintain(self, now: float) -> bool:
        """Flush the process's channel, or start a process if one is due. Returns whether there was one."""
        if self._process is not None:
            self._process.channel.flush()
            return True
        if self._restarts.is_due(now) and not self._is_closed:
            logger.info("Loading %s in a model process.", self._settings.model)
            self._process = self._launch(self._hostname)
            self._io.watch(self._process)
        return False

    def replace_if_hung(self, now: float) -> None:
        """Kill a process that sends no heartbeats or loads for too long; `receive` then notices its death."""
        cause = _fault(self._process, self._settings, now) if self._process is not None else ""
        if cause:
            logger.error(HUNG if cause == "hung" else LOADS_TOO_LONG)
            self.kill(cause)

    def kill(self, because: str = "") -> None:
        """Kill the process; `receive` then notices its death. `because`: the cause for `RESTARTS`."""
        if self._process is not None:
            self._killed_because = because
            self._process.kill()

    def close(self) -> None:
        """Start no more processes."""
        self._is_closed = True

    def end(self, grace_s: float = 0.0) -> int | None:
        """End the process and return its exit status. One that is ready gets `grace_s` seconds to end by itself."""
        process = self._process
        if process is None:
            return None
        self._io.unwatch(process)
        if process.is_ready and grace_s:
            process.channel.send(Stop())
        status = _end(process, grace_s)
        self._process = None
        return status

    def give_up(self, why: str) -> None:
        """Start no more processes, and have the worker stop: the model cannot be served."""
        self._restarts.end()
        self._on_give_up(why)

    # Messages

    def hear(self, now: float) -> None:
        """Receive. Time during which this process itself was blocked or paused is not the model process's silence."""
        missed_s, self._heard_at = now - self._heard_at, now
        if missed_s > self._silent_s and self._process is not None:
            self._process.last_heartbeat = min(now, self._process.last_heartbeat + missed_s)
        self.receive()

    @log_defects
    def receive(self) -> None:
        """Handle the messages that have arrived, and then the process's death."""
        if self._process is None:
            return
        messages, is_gone = self._process.receive()
        for message in messages:
            self._hear(message)
        if is_gone:
            self._on_death()

    @log_defects
    def _hear(self, message: FromModelProcess) -> None:
        assert self._process is not None
        assert self._listener is not None
        match message:
            case Ready():
                self._on_ready(self._process)
                self._listener.process_started()
            case CannotServe(reason):
                logger.critical("The model cannot be served: %s The worker stops.", reason)
                self.give_up(reason)
            case Metrics(changed):
                MODEL_PROCESS.update(changed)
            case Heartbeat():
                # Sent by the engine's thread. Job threads' messages do not count: they continue while the engine is
                # stuck.
                self._process.last_heartbeat = time.monotonic()
                self._listener.heard(message)
            case _:
                self._listener.heard(message)

    def _on_ready(self, process: ModelProcess) -> None:
        process.is_ready = True
        process.last_heartbeat = time.monotonic()
        self._has_been_ready = True
        self._restarts.loaded()
        seconds = time.monotonic() - process.started_at
        logger.info("The model is ready after %.1f s (process %d).", seconds, process.pid)

    def _on_death(self) -> None:
        was_ready = self.is_ready
        status = self.end(LEAVE_S)
        assert status is not None
        assert self._listener is not None
        self._listener.process_ended(status)
        if self._is_closed or self.has_given_up:
            return
        RESTARTS.labels(self._killed_because or _cause(status)).inc()
        self._killed_because = ""
        if not self._restarts.died(time.monotonic(), was_ready=was_ready):
            logger.critical(DIED_LOADING, self._restarts.failures + 1)
            self.give_up("its process died each time while loading: see the log")

    # The event loop

    def watch(self, hub: Hub) -> None:
        """Read and write on this event loop, which is empty. Called again at each reconnect to the broker."""
        self._io.use(hub)
        if self._process is not None:
            self._io.watch(self._process)

    def unwatch(self) -> None:
        """From here on the caller waits for `descriptors`."""
        if self._process is not None:
            self._io.unwatch(self._process)
        self._io.use(None)

    def descriptors(self) -> tuple[list[Any], list[Any]]:
        """The objects to wait for with `select`: to be read, and to be written."""
        if self._process is None:
            return [], []
        channel = self._process.channel
        return [channel], [channel] if channel.has_unsent else []

    def send(self, message: ToModelProcess) -> None:
        """Send to the process. There must be one."""
        assert self._process is not None
        self._io.send(self._process, message)


def _fault(process: ModelProcess, settings: Settings, now: float) -> str:
    """Why a process must be replaced, as a label of `RESTARTS`; empty if it must not."""
    if process.is_ready:
        return "hung" if now - process.last_heartbeat > settings.hang_timeout_s else ""
    return "load_timeout" if now - process.started_at > settings.load_timeout_s else ""


def _end(process: ModelProcess, grace_s: float) -> int:
    """End a process and keep what it counted: it sends the last values at an orderly end. Returns its exit status."""
    status = process.end(grace_s)
    for message in process.receive()[0]:
        if isinstance(message, Metrics):
            MODEL_PROCESS.update(message.changed)
    MODEL_PROCESS.process_ended()
    process.close()
    return status


def _cause(status: int) -> str:
    """The label of `RESTARTS` for a process that ended by itself with an exit status."""
    if status == DEVICE_LOST:
        return "device_lost"
    if status == -signal.SIGKILL:
        return "killed"
    return "crashed" if status < 0 else "exited"
