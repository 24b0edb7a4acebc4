"""The model process: job threads around one engine. `python -m worker.model_process FD HOSTNAME`, by the pool only.

Each job runs as an ordinary Celery task, through Celery's own tracer, which stores its result and fires its links,
chords and retries.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from billiard import einfo
from billiard.einfo import ExceptionInfo
from billiard.process import current_process
from celery.app.trace import fast_trace_task
from celery.concurrency.prefork import process_initializer
from celery.exceptions import Reject, TaskPredicate
from celery.states import FAILURE

from config.settings import Settings
from tasks.redis_keys import results_prefix
from worker import app as worker_app
from worker.delivery.recorder import TerminalState
from worker.engine.engine import Engine, Pace
from worker.engine.interfaces import Model
from worker.engine.scheduler import Limits
from worker.jobs.answer_cache import AnswerCache, fingerprint
from worker.jobs.service import Service
from worker.models.fake import fake_model
from worker.observability.redaction import without_values
from worker.pool.wire import BlockingChannel
from worker.queue import patience
from worker.queue.patience import RedisAway
from worker.queue.result_backend import digest_of
from worker.runtime import gil
from worker.runtime.cpu import all_cores, go_last, job_cores, leave_cores_to_the_engine

logger = logging.getLogger(__name__)

#: Seconds between two signs of life to the parent.
BEAT_S = 0.5
#: And at least, where there is news.
SOON_S = 0.05
#: Seconds a Python thread keeps the interpreter while another wants it. Job threads must not hold the engine up:
#: measured against the default of 5 ms, steps of 5 ms went from 162 to 192 of an ideal 213 a second.
SWITCH_S = 0.0005

# It copies all positions in the code of each of a traceback's frames, Celery's own among them, which took milliseconds
# of each failure: once for each code will do.
einfo._Frame.Code = staticmethod(functools.lru_cache(1_000)(einfo._Code))


class ModelProcess:
    """What the process does with each of its parent's messages."""

    def __init__(self, channel: BlockingChannel, service: Service, redis_wait_s: float) -> None:
        self._channel = channel
        self._redis_wait_s = redis_wait_s
        self._service = service
        self._queue: queue.SimpleQueue[tuple[int, tuple[Any, ...]]] = queue.SimpleQueue()
        self._ids: dict[int, str] = {}
        #: Which job each thread runs.
        self._thread = threading.local()

    def serve(self, threads: int) -> None:
        """Run jobs until the parent says stop or is gone."""
        gil.set_permits(len(job_cores(all_cores())))
        patience.allow(self._redis_wait_s, self._tell_wait)
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
        id = self._ids.get(serial)
        if id is not None and self._service.cancel(id):
            # Its thread loads images and ends when they have come: what it says then is too late to count.
            self._channel.send(("canceled", serial, None))

    def abandon(self, serial: int) -> None:
        """The job has ended by its limit: what its thread makes of it no longer counts."""
        id = self._ids.get(serial)
        if id is not None:
            self._service.abandon(id)

    def _tell_wait(self, seconds: float) -> None:
        """A job that waits for Redis does not use its time up."""
        serial = getattr(self._thread, "serial", None)
        if serial is not None:
            self._channel.send(("waited", serial, seconds))

    def give_back(self, most: int, serials: Sequence[int]) -> None:
        """Another worker is idle: end the runs of those that have not begun."""
        ids = {self._ids[serial]: serial for serial in serials if serial in self._ids}
        with self._service.withdrawn(list(ids), most) as withdrawn:
            # Before they end: the parent puts them back together, in order.
            self._channel.send(("withdrawn", [ids[id] for id in withdrawn]))

    def _work(self) -> None:
        leave_cores_to_the_engine()
        while True:
            serial, arguments = self._queue.get()
            self._thread.serial = serial
            message = self._outcome(serial, arguments)
            self._service.forget(self._ids.pop(serial))
            self._channel.send(message)

    def _outcome(self, serial: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._service.is_canceled(arguments[1]):
            return "canceled", serial, None
        self._channel.send(("accepted", serial, time.monotonic()))
        try:
            with gil.held():
                outcome = fast_trace_task(*arguments)
            if _failed_outside_the_task(outcome):
                # The tracer has stored an end, and skipped what follows it.
                name, id, request, *_ = arguments
                _announce(name, id, request, (FAILURE, _bare(outcome[1])))
        except RedisAway as error:
            logger.error("Redis is away for too long (%s): job %s goes back to the queue.", error, arguments[1])
            return "away", serial
        except Reject:
            return "raised", serial, ExceptionInfo()
        except BaseException as error:
            # A SystemExit that went on would end the thread, and the job would run for ever.
            logger.error("A job ended outside Celery's tracer: %s", without_values(error))
            return "broken", serial, f"{type(error).__name__} in the worker."
        failed, value, _ = outcome
        raised = _bare(value) if failed else None
        if failed:
            # Its text has been stored, and the parent reads no frames.
            value.tb = None
        if isinstance(raised, worker_app.JobReturned):
            return "returned", serial
        if isinstance(raised, worker_app.JobCanceled):
            return "canceled", serial, raised.partial
        return "done", serial, outcome


def _announce(name: str, id: str, request: dict[str, Any], end: TerminalState) -> None:
    # The tracer has put the arguments there.
    asked = digest_of(name, request["args"], request["kwargs"])
    task, is_stored = worker_app.app.tasks[name], not request.get("ignore_result")
    task.announcer.announce(id, name, request["kwargs"], end, is_stored=is_stored, asked=asked)


def _failed_outside_the_task(outcome: tuple[Any, ...]) -> bool:
    """In what Celery does around it: its links, its result."""
    failed, value, _ = outcome
    return bool(failed and value.internal and not isinstance(_bare(value), TaskPredicate))


def _bare(info: ExceptionInfo) -> BaseException:
    """Billiard wraps the exceptions that it pickles."""
    bare: BaseException = getattr(info.exception, "exc", info.exception)
    return bare


class Heart:
    """Called at each step, tells the parent from time to time that it was, and the pace."""

    def __init__(self, channel: BlockingChannel, model: Model, most: int) -> None:
        self.pace: Callable[[], Pace] = lambda: Pace(most, most, 0.0)
        self._channel = channel
        self._model = model
        self._last = 0.0
        self._told = 0

    def __call__(self) -> None:
        past = time.monotonic() - self._last
        if past < SOON_S:
            return
        pace = self.pace()
        if past >= BEAT_S or pace.capacity != self._told:
            self._last, self._told = time.monotonic(), pace.capacity
            self._channel.send(("beat", self._model.figures(), tuple(pace)))


def _service(settings: Settings, channel: BlockingChannel) -> Service:
    """The model, loaded, warm and right."""
    # Job threads split texts side by side: threads of the tokenizer's own would only be more of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # On a CPU two threads compute, the engine's and the encoder's: they share the cores.
    torch.set_num_threads(settings.torch_threads or max(1, len(all_cores()) // 2))
    model, folder = _load(settings)
    limits = Limits(settings.max_batch_size, settings.max_batch_tokens)
    beat = Heart(channel, model, limits.rows)
    engine = Engine(model, limits, beat, _prepare_engine)
    service = Service(settings, model.info, model.codec, engine, _answers(settings, folder), model.rules)
    beat.pace = lambda: service.pace
    engine.start()
    service.check_golden(folder)
    return service


def _prepare_engine() -> None:
    if not torch.accelerator.is_available():
        go_last()


def _load(settings: Settings) -> tuple[Model, Path | None]:
    """The model that the settings name, and its folder where it has one. Raises SetupFailed."""
    fake = fake_model(settings.model)
    if fake is not None:
        return fake, None
    if settings.offline:
        # Read when it is imported: no library of the hub's then tries the network.
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Bars are for terminals: in a log each of their states is a line.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # transformers takes seconds to import: the fake is spared them.
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    from worker.models import checkpoint_folder
    from worker.models.loading import load

    return load(settings), checkpoint_folder(settings)


def _answers(settings: Settings, folder: Path | None) -> AnswerCache | None:
    if not settings.answer_cache_ttl_s:
        return None
    from huggingface_hub.constants import HF_HOME

    # A hub id needs none: the commit of its snapshot is a part of the model's description.
    weights = fingerprint(folder, Path(HF_HOME) / "idefics-jobs") if folder else ""
    app = worker_app.app
    return AnswerCache(app.backend.client, settings.answer_cache_ttl_s, weights, results_prefix(app))


def main() -> None:
    channel = BlockingChannel(socket.socket(fileno=int(sys.argv[1])))
    current_process()._name = "ModelProcess"
    process_initializer(worker_app.app, sys.argv[2])
    # The parent decides when this process ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_S)
    settings = worker_app.settings
    # Kombu's own attempts to connect would hold the interpreter's permit: the publisher waits.
    worker_app.app.conf.broker_transport_options = {**worker_app.app.conf.broker_transport_options, "max_retries": 0}
    try:
        service = _service(settings, channel)
    except RuntimeError as error:
        channel.send(("setup_failed", str(error)))
        sys.exit(1)
    worker_app.serve_with(service)
    # What loading made lives as long as the process: the collector need not look at it again.
    gc.freeze()
    ModelProcess(channel, service, settings.redis_wait_s).serve(settings.job_threads)
    # Threads wait in downloads and in the engine: nothing of theirs is owed to anybody.
    os._exit(0)


if __name__ == "__main__":
    main()
