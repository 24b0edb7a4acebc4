"""The callbacks worker: `celery -A worker.callbacks worker`. Light: no torch, no model, no images.

Celery starts and stops it, logs and answers pings. Its work is in the outbox (`tasks/outbox.py`), sorted sets in Redis;
`worker/delivery/callback_dispatcher.py` does it. The worker's queue stays empty: messages would be a second, unordered
copy of the outbox's schedule that had to be kept in step.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from celery import Celery, bootsteps
from celery.signals import celeryd_init, setup_logging, worker_init

from config.celery import configuration, drop_overrides
from config.settings import load
from tasks.outbox import outbox_of
from tasks.protocol import CALLBACK_QUEUE, DEFAULT_PRIORITY
from worker.delivery.callback_dispatcher import CallbackDispatcher
from worker.observability import exposition, log_setup, setup_hook, tracing
from worker.queue.redis_check import BrokerCheck
from worker.runtime.exit_watchdog import ExitInTime, HeldWork

logger = logging.getLogger(__name__)

#: In the log.
PROCESS_NAME = "callbacks"

settings = load()

#: Why the worker may not start: one of Celery's variables names another server than our settings. None otherwise.
override_error = drop_overrides(os.environ, settings)


class DispatcherStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts and stops the dispatcher with Celery's worker."""

    requires = (BrokerCheck,)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._dispatcher: CallbackDispatcher | None = None

    def start(self, worker: Any) -> None:
        self._dispatcher = CallbackDispatcher(outbox_of(worker.app), settings)
        self._dispatcher.start()
        if not settings.callback_keys:
            logger.warning(
                "IDEFICS_CALLBACK_KEYS is empty: no callback can be signed. Set it here and for the models' workers, "
                "as main=whsec_..., with a secret from `openssl rand -base64 32`."
            )

    def stop(self, worker: Any) -> None:
        if self._dispatcher is not None:
            self._dispatcher.stop()
            self._dispatcher = None

    terminate = stop

    @property
    def is_busy(self) -> bool:
        """True while attempts run."""
        dispatcher = self._dispatcher
        return dispatcher is not None and dispatcher.is_busy


class DispatcherExitInTime(ExitInTime):
    """The exit watchdog of this worker, which holds no messages: it waits for running attempts."""

    def held(self, worker: Any) -> HeldWork:
        step = next(step for step in worker.steps if isinstance(step, DispatcherStep))
        return HeldWork(is_running=step.is_busy, has_messages=False)


def _app() -> Celery:
    app = Celery("idefics.callbacks", set_as_current=False)
    # For the consumer.
    app.settings = settings
    app.conf.update(configuration(settings, CALLBACK_QUEUE, DEFAULT_PRIORITY))
    # It runs no tasks; the dispatcher has its own threads.
    app.conf.update(worker_pool="solo", worker_prefetch_multiplier=1)
    # Its Redis user may access neither the GPU workers' mailbox nor the messages that they hold: it has its own
    # mailbox, and does not redeliver messages.
    app.conf.control_exchange = "idefics.callbacks"
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "ack_emulation": False}
    app.steps["worker"].update([BrokerCheck, DispatcherStep, DispatcherExitInTime])
    return app


app = _app()


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def _set_up_logging(logfile: str | None = None, **_: Any) -> None:
    log_setup.set_up(settings, PROCESS_NAME, logfile)
    setup_hook.run(settings.setup, PROCESS_NAME)
    tracing.start(settings.traces, PROCESS_NAME)


@celeryd_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _use_log_for_all_lines(instance: Any, **_: Any) -> None:
    # Celery's signals are sent for all apps of a process.
    if instance.app is app:
        log_setup.use_for_all_lines(instance, settings, PROCESS_NAME)


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _prepare(sender: Any, **_: Any) -> None:
    if sender.app is app:
        if error := override_error or log_setup.refusal(app.conf):
            sys.exit(error)
        exposition.serve_callbacks(settings.metrics_address)
