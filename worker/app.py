"""The Celery app: `celery -A worker.app worker` starts a worker with the settings' defaults.

Both processes of a worker import this module, and the parent never loads torch. Tasks run in the model process
(`worker/model_process.py`), which sets `app.service` once its model is loaded.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from celery.signals import celeryd_init, setup_logging, worker_init

from config.celery import configuration, drop_overrides
from config.settings import load
from tasks.failed import FailedBounds
from tasks.payloads import PAYLOADS
from tasks.protocol import DEFAULT_PRIORITY
from worker.jobs.task import JobApp, JobTask
from worker.observability import exposition, log_setup, setup_hook, tracing
from worker.pool import PoolExitInTime, SoftShutdown, refuse_other_pools
from worker.queue.cancellation import Cancellations
from worker.queue.dead_letters import keep_failures
from worker.queue.load_balancing import LoadBalancing
from worker.queue.refusals import Refusals
from worker.queue.transport import use as use_transport
from worker.queue.worker_registration import WorkerRegistration

settings = load()

#: Why the worker may not start: one of Celery's variables names another server than our settings. None otherwise.
override_error = drop_overrides(os.environ, settings)


def _app() -> JobApp:
    app = JobApp("idefics", settings, amqp="worker.queue.publisher:AMQP", set_as_current=False)
    app.conf.update(configuration(settings, settings.queue, DEFAULT_PRIORITY, PAYLOADS))
    app.steps["worker"].update([SoftShutdown, Cancellations, PoolExitInTime, LoadBalancing, WorkerRegistration])
    failed_bounds = FailedBounds(settings.failed_max, settings.failed_max_bytes, settings.failed_ttl_s)
    use_transport(Refusals(app, failed_bounds), atomic=settings.atomic_reserve)
    keep_failures(app, failed_bounds)
    _register_tasks(app)
    return app


def _register_tasks(app: JobApp) -> None:
    """Register the six tasks, one for each payload, and nothing else."""
    for name, payload in PAYLOADS.items():
        attributes = {"name": name, "__doc__": payload.__doc__, "Request": "worker.pool.request:JobRequest"}
        app.register_task(type(payload.__name__, (JobTask,), attributes)())
    # Celery's built-in tasks would let a message run any task or end any job.
    for name in set(app.tasks) - PAYLOADS.keys():
        app.tasks.pop(name)


app = _app()


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def _set_up_logging(logfile: str | None = None, **_: Any) -> None:
    log_setup.set_up(settings, app.process_name, logfile)
    setup_hook.run(settings.setup, app.process_name)
    tracing.start(settings.traces, app.process_name)


@celeryd_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _use_log_for_all_lines(instance: Any, **_: Any) -> None:
    # Celery's signals are sent for all apps of a process.
    if instance.app is app:
        log_setup.use_for_all_lines(instance, settings, app.process_name)


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _prepare(sender: Any, **_: Any) -> None:
    if sender.app is app:
        if error := override_error or log_setup.refusal(app.conf):
            sys.exit(error)
        refuse_other_pools(sender)
        # Before the model loads, since an address in use ends the start.
        exposition.serve_worker(settings.metrics_address)
