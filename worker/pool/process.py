"""The model process: job threads around one engine. `python -m worker.pool.process FD HOSTNAME`, by the pool only.

Each job runs as an ordinary Celery task, through Celery's own tracer, which stores its result and fires its links,
chords and retries.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from billiard.einfo import ExceptionInfo
from billiard.process import current_process
from celery.app.task import Context
from celery.app.trace import fast_trace_task
from celery.concurrency.prefork import process_initializer
from celery.exceptions import Reject

from config.settings import Settings
from tasks.errors import Internal
from worker import app as worker_app
from worker.answers import Answers
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.models import Model
from worker.models.loading import SetupFailed, checkpoint_folder, load
from worker.pool.job import exception_info
from worker.pool.wire import BlockingChannel
from worker.service import Service

logger = logging.getLogger(__name__)

#: Seconds between two signs of life to the parent.
BEAT_S = 0.5
#: Seconds a Python thread keeps the interpreter while another wants it. Job threads must not hold the engine up:
#: measured against the default of 5 ms, steps of 5 ms went from 162 to 192 of an ideal 213 a second.
SWITCH_S = 0.0005
#: Celery's outcome of a redelivered job that it finds to have succeeded. It has seen to its links, not to its chord.
HAD_SUCCEEDED = (0, None, None)


class ModelProcess:
    """What the process does with each of its parent's messages."""

    def __init__(self, channel: BlockingChannel, service: Service) -> None:
        self._channel = channel
        self._service = service
        self._queue: queue.SimpleQueue[tuple[int, tuple[Any, ...]]] = queue.SimpleQueue()
        self._ids: dict[int, str] = {}
        self._canceled: set[int] = set()

    def serve(self, threads: int) -> None:
        """Run jobs until the parent says stop or is gone."""
        for number in range(threads):
            threading.Thread(target=self._work, name=f"job-{number}", daemon=True).start()
        self._channel.send(("ready",))
        for kind, *content in self._channel:
            if kind == "stop":
                return
            getattr(self, kind)(*content)

    def run(self, serial: int, arguments: tuple[Any, ...]) -> None:
        self._ids[serial] = arguments[1]
        self._queue.put((serial, arguments))

    def cancel(self, serial: int) -> None:
        if serial in self._ids:
            self._canceled.add(serial)
            self._service.cancel(self._ids[serial])

    def _work(self) -> None:
        while True:
            serial, arguments = self._queue.get()
            message = self._outcome(serial, arguments)
            self._ids.pop(serial, None)
            self._canceled.discard(serial)
            self._channel.send(message)

    def _outcome(self, serial: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if serial in self._canceled:
            return "canceled", serial
        self._channel.send(("accepted", serial, time.monotonic()))
        try:
            outcome = fast_trace_task(*arguments)
            if outcome == HAD_SUCCEEDED:
                worker_app.app.backend.repeat_end(Context(arguments[2]))
        except Reject:
            return "raised", serial, ExceptionInfo()
        except BaseException as error:
            # A SystemExit that went on would end the thread, and the job would run for ever.
            logger.exception("A job ended outside Celery's tracer.")
            return "raised", serial, exception_info(Internal(f"{type(error).__name__} in the worker."))
        failed, value, _ = outcome
        if failed and isinstance(_bare(value), worker_app.JobCanceled):
            return "canceled", serial
        return "done", serial, outcome


def _bare(info: ExceptionInfo) -> BaseException:
    """Billiard wraps the exceptions that it pickles."""
    bare: BaseException = getattr(info.exception, "exc", info.exception)
    return bare


def _beat(channel: BlockingChannel, model: Model) -> Callable[[], None]:
    last = 0.0

    def beat() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= BEAT_S:
            last = now
            channel.send(("beat", model.figures()))

    return beat


def _service(settings: Settings, channel: BlockingChannel) -> Service:
    """The model, loaded, warm and right."""
    # On a CPU two threads compute, the engine's and the encoder's: they share the cores.
    torch.set_num_threads(settings.torch_threads or max(1, (os.cpu_count() or 1) // 2))
    model = load(settings)
    engine = Engine(model, Limits(settings.max_batch_size, settings.max_batch_tokens), _beat(channel, model))
    service = Service(settings, model, engine, _answers(settings))
    engine.start()
    service.check_golden(checkpoint_folder(settings))
    return service


def _answers(settings: Settings) -> Answers | None:
    if not settings.answer_cache_ttl_s:
        return None
    return Answers(worker_app.app.backend.client, settings.answer_cache_ttl_s)


def main() -> None:
    channel = BlockingChannel(socket.socket(fileno=int(sys.argv[1])))
    current_process()._name = "ModelProcess"
    process_initializer(worker_app.app, sys.argv[2])
    # The parent decides when this process ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_S)
    try:
        service = _service(worker_app.settings, channel)
    except (SetupFailed, RuntimeError) as error:
        channel.send(("setup_failed", str(error)))
        sys.exit(1)
    worker_app.serve_with(service)
    # What loading made lives as long as the process: the collector need not look at it again.
    gc.freeze()
    ModelProcess(channel, service).serve(worker_app.settings.job_threads)
    # Threads wait in downloads and in the engine: nothing of theirs is owed to anybody.
    os._exit(0)


if __name__ == "__main__":
    main()
