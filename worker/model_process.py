"""The model process: job threads around one engine. The pool starts it: `python -m worker.model_process FD HOSTNAME`.

Each job runs as an ordinary Celery task, through Celery's own tracer, which stores its result and fires its links,
chords and retries.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never

from billiard import einfo
from billiard.einfo import ExceptionInfo
from billiard.process import current_process
from celery.app.trace import fast_trace_task
from celery.concurrency.prefork import process_initializer
from celery.exceptions import Reject, TaskPredicate
from celery.states import FAILURE
from redis import Redis

from config.settings import Settings
from tasks.outbox import connect
from tasks.redis_keys import broker_prefix, results_prefix
from tasks.review import ReviewBounds, ReviewList
from worker.app import app
from worker.delivery.recorder import TerminalState
from worker.engine.device_errors import is_device_lost
from worker.engine.engine import Engine
from worker.engine.interfaces import Model
from worker.images.download_limits import DownloadLimits
from worker.images.host_leases import HostLeases
from worker.images.parking import ParkedJobs
from worker.jobs.answer_cache import AnswerCache
from worker.jobs.canary import Canary
from worker.jobs.live_updates import LiveUpdates
from worker.jobs.receipts import Receipts
from worker.jobs.reviews import Reviews
from worker.jobs.row_builder import prompt_bound
from worker.jobs.service import Service
from worker.jobs.task import RunCanceled, RunParked, RunReturned
from worker.models.fingerprint import WeightsHash, fingerprint, hashes_folder
from worker.models.start import batch_limits, load_model, model_facts
from worker.observability import tracing
from worker.observability.job_fields import about_job
from worker.observability.log_lines import Lines
from worker.observability.metrics import MODEL
from worker.observability.redaction import without_message
from worker.pool.heartbeat import METRICS_S, UNSERVED_METRICS_S, HeartbeatSender, MetricsSender
from worker.pool.wire import (
    DEVICE_LOST,
    Abandon,
    Away,
    BlockingChannel,
    Broken,
    Cancel,
    Canceled,
    CannotServe,
    Done,
    FinalMessage,
    GiveBack,
    Parked,
    Raised,
    Ready,
    Resume,
    Returned,
    RunJob,
    Started,
    Stop,
    Waited,
    Withdrawn,
)
from worker.queue import redis_retry
from worker.queue.redis_retry import RedisAway
from worker.queue.result_backend import digest_of
from worker.runtime import gil
from worker.runtime.cpu import all_cores, go_last, job_cores, leave_cores_to_the_engine

# By its name as a module, not as the program.
logger = logging.getLogger("worker.model_process")

#: Seconds that a Python thread keeps the GIL while another thread waits for it. Job threads must not delay the engine:
#: with the default of 5 ms, 162 steps of an ideal 213 ran in a second, and with this value 192.
SWITCH_S = 0.0005
# Billiard copies all positions in the code of each frame of a traceback, which took milliseconds for each failure. The
# cache copies them once for each code object.
einfo._Frame.Code = staticmethod(functools.lru_cache(1_000)(einfo._Code))


class JobThreads:
    """The threads that run jobs, one job each at a time, directed by the parent's messages."""

    def __init__(
        self, channel: BlockingChannel, service: Service, settings: Settings, downloads: DownloadLimits
    ) -> None:
        self._channel = channel
        self._service = service
        self._downloads = downloads
        self._settings = settings
        self._queue: queue.SimpleQueue[RunJob] = queue.SimpleQueue()
        #: Ids of the queued and running jobs, by serial number.
        self._ids: dict[int, str] = {}
        #: The serial number of the job that a thread runs.
        self._current = threading.local()

    def serve(self) -> None:
        """Run jobs until the parent sends Stop or is gone."""
        gil.set_permits(len(job_cores(all_cores())))
        redis_retry.enable(self._settings.redis_wait_s, self._report_wait)
        for number in range(self._settings.job_threads):
            threading.Thread(target=self._work, name=f"job-{number}", daemon=True).start()
        self._channel.send(Ready())
        for message in self._channel:
            if isinstance(message, Stop):
                return
            self._obey(message)

    def _obey(self, message: RunJob | Cancel | Abandon | GiveBack) -> None:
        match message:
            case RunJob(serial, arguments):
                self._ids[serial] = arguments[1]
                self._queue.put(message)
            case Cancel(serial):
                self._cancel(serial)
            case Abandon(serial):
                self._abandon(serial)
            case GiveBack(most, serials):
                self._give_back(most, serials)
            case _:
                assert_never(message)

    def _cancel(self, serial: int) -> None:
        id = self._ids.get(serial)
        if id is not None and self._service.cancel(id):
            # Its thread still loads images; the parent ignores the outcome that the thread sends later.
            self._channel.send(Canceled(serial))

    def _abandon(self, serial: int) -> None:
        id = self._ids.get(serial)
        if id is not None:
            self._service.abandon(id)

    def _give_back(self, most: int, serials: Sequence[int]) -> None:
        ids = {self._ids[serial]: serial for serial in serials if serial in self._ids}
        with self._service.withdrawn(list(ids), most) as withdrawn:
            # Sent before the jobs end, so that the parent returns them together, in order.
            self._channel.send(Withdrawn([ids[id] for id in withdrawn]))

    def _report_wait(self, seconds: float) -> None:
        """Report to the parent that this thread's job waited for Redis."""
        serial = getattr(self._current, "serial", None)
        if serial is not None:
            self._channel.send(Waited(serial, seconds))

    def _work(self) -> None:
        leave_cores_to_the_engine()
        while True:
            job = self._queue.get()
            self._current.serial = job.serial
            outcome = self._outcome(job)
            self._service.forget(self._ids.pop(job.serial))
            self._channel.send(outcome)
            if isinstance(outcome, Parked):
                # Not before the parent has heard of it, which the limits then ask for it.
                self._downloads.park(outcome.host)

    def _outcome(self, job: RunJob) -> FinalMessage:
        if self._service.is_canceled(job.arguments[1]):
            return Canceled(job.serial)
        self._channel.send(Started(job.serial, time.monotonic()))
        name, id, headers, *_ = job.arguments
        with about_job(id, name), tracing.job(name, id, headers):
            return traced(job)


def traced(job: RunJob) -> FinalMessage:
    """Run a job through Celery's tracer in the calling thread. Never raises, since a thread runs many jobs."""
    name, id, request, *_ = job.arguments
    try:
        with gil.held():
            outcome = fast_trace_task(*job.arguments)
        if _failed_outside_the_task(outcome):
            # The tracer has stored the failure and skipped the steps after it, such as the callback.
            _record_callback(name, id, request, (FAILURE, _bare(outcome[1])))
    except RedisAway as error:
        logger.error("Redis is away for too long (%s): job %s goes back to the queue.", error, id)
        return Away(job.serial)
    except Reject:
        return Raised(job.serial, ExceptionInfo())
    except BaseException as error:
        # A SystemExit would otherwise end the thread, and the job would never end.
        logger.error("Job %s ended outside Celery's tracer.", id, exc_info=without_message(error))
        return Broken(job.serial, f"{type(error).__name__} in the worker.")
    return _reported(job.serial, outcome)


def _reported(serial: int, outcome: tuple[Any, ...]) -> FinalMessage:
    """The message to the parent about the tracer's outcome."""
    failed, value, _ = outcome
    if failed:
        # The traceback's text is stored already, and the parent does not read frames.
        value.tb = None
        error = _bare(value)
        if isinstance(error, RunReturned):
            return Returned(serial)
        if isinstance(error, RunParked):
            return Parked(serial, error.host)
        if isinstance(error, RunCanceled):
            return Canceled(serial, error.partial)
    return Done(serial, outcome)


def _record_callback(name: str, id: str, request: dict[str, Any], terminal_state: TerminalState) -> None:
    # The tracer has put the arguments there.
    digest = digest_of(name, request["args"], request["kwargs"])
    is_stored = not request.get("ignore_result")
    app.recorder.record(id, name, request["kwargs"], terminal_state, is_stored=is_stored, digest=digest)


def _failed_outside_the_task(outcome: tuple[Any, ...]) -> bool:
    """Whether Celery's own work around the task failed: its links, its result."""
    failed, value, _ = outcome
    return bool(failed and value.internal and not isinstance(_bare(value), TaskPredicate))


def _bare(info: ExceptionInfo) -> BaseException:
    """The exception itself: billiard wraps those that it pickles."""
    bare: BaseException = getattr(info.exception, "exc", info.exception)
    return bare


def _service(
    settings: Settings, channel: BlockingChannel, metrics: MetricsSender, downloads: DownloadLimits
) -> Service:
    """Load the model, start its engine, and check its golden answer. Raises SetupFailed."""
    model, folder = load_model(settings)
    _describe(model)
    limits = batch_limits(model, settings)
    heartbeat = HeartbeatSender(channel, model, limits.rows, metrics)
    engine = Engine(model, limits, heartbeat, _prepare_engine, _end_without_device)
    live = LiveUpdates(app.backend.client, model.codec.decode, results_prefix(app))
    answers = _answers(settings, folder)
    receipts = Receipts(model.info, model.path, WeightsHash(model.info, folder))
    canary = Canary(settings.canary, engine) if settings.canary else None
    service = Service(
        settings,
        model.info,
        model.codec,
        engine,
        answers,
        model.rules,
        downloads,
        live,
        receipts,
        canary,
        _reviews(settings),
    )
    service.prepare()
    heartbeat.throughput, heartbeat.rows = lambda: service.throughput, lambda: engine.running
    engine.start()
    service.check_golden(folder)
    facts = model_facts(model, settings, prompt_bound(settings, model.codec.context_tokens)[0])
    logger.info("The model answers.\n%s", Lines("\n".join(facts)))
    return service


def _describe(model: Model) -> None:
    """Set the metric with the model's description."""
    info, engine = model.info, type(model).__name__.removesuffix("Model").lower()
    MODEL.labels(info.id, info.revision or "", info.family, info.dtype, info.quantization or "none", engine).set(1)


def _prepare_engine() -> None:
    # It is loaded with the model, if that is not the fake one.
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        go_last()


def _end_without_device(error: BaseException) -> None:
    """End the process, whose device computes nothing more. The pool starts another one, which runs its jobs again."""
    logger.critical("The device is lost: %s. The model process ends.", str(error).partition("\n")[0])
    os._exit(DEVICE_LOST)


def _download_limits(settings: Settings, channel: BlockingChannel) -> DownloadLimits:
    leases = HostLeases(_broker_client, settings.image_host_shared) if settings.image_host_shared else None
    return DownloadLimits(settings, ParkedJobs(lambda host, most: channel.send(Resume(host, most))), leases)


def _broker_client() -> tuple[Redis, str]:
    """A client of the broker, without retries, and the prefix of all keys."""
    return connect(app), broker_prefix(app)


def _answers(settings: Settings, folder: Path | None) -> AnswerCache | None:
    if not settings.answer_cache_ttl_s:
        return None
    # A hub id needs no fingerprint, since the commit of its snapshot is part of the model's description.
    weights = fingerprint(folder, hashes_folder()) if folder else ""
    return AnswerCache(app.backend.client, settings.answer_cache_ttl_s, weights, results_prefix(app))


def _reviews(settings: Settings) -> Reviews | None:
    if not settings.review_max:
        return None
    # A client that does not wait: a job must not, for its place on the list.
    redis = Redis(connection_pool=app.backend.client.connection_pool)
    return Reviews(
        ReviewList(app, redis), ReviewBounds(settings.review_max, settings.review_max_bytes, settings.review_ttl_s)
    )


def main() -> None:
    channel = BlockingChannel(socket.socket(fileno=int(sys.argv[1])))
    current_process()._name = "ModelProcess"
    app.process_name = "model"
    try:
        # It calls IDEFICS_SETUP too.
        process_initializer(app, sys.argv[2])
    except SystemExit as refusal:
        channel.send(CannotServe(str(refusal)))
        raise
    # The parent decides when this process ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_S)
    settings = app.settings
    # Kombu's own attempts to connect would hold the GIL permit; the publisher waits without it.
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "max_retries": 0}
    downloads = _download_limits(settings, channel)
    metrics = MetricsSender(channel, METRICS_S if settings.metrics_address else UNSERVED_METRICS_S)
    try:
        service = _service(settings, channel, metrics, downloads)
    except RuntimeError as error:
        if is_device_lost(error):
            # Another process may find it well again.
            _end_without_device(error)
        channel.send(CannotServe(str(error)))
        sys.exit(1)
    app.service = service
    tracing.describe(service.model.id)
    # Objects made while loading live as long as the process, so the garbage collector can skip them.
    gc.freeze()
    JobThreads(channel, service, settings, downloads).serve()
    # The parent may be gone.
    with contextlib.suppress(OSError):
        metrics.send()
    tracing.stop()
    # Threads that still wait in downloads or in the engine have nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main()
