"""The pool's bootsteps, and the check of the pool, at the start and end of Celery's worker."""

from __future__ import annotations

import functools
import sys
from typing import Any

from celery import bootsteps
from celery.concurrency import get_implementation
from kombu.common import ignore_errors

from worker.pool.pool import InferencePool
from worker.runtime.exit_watchdog import ExitInTime, HeldWork


def refuse_other_pools(worker: Any) -> None:
    """End the start of a worker with another pool (`-P`), which would have no model and ignore all limits.

    To be called before Celery creates that pool, which may start processes.
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
    """Celery's soft shutdown always sleeps for its whole timeout; this one ends with the last running job."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        timeout = worker.app.conf.worker_soft_shutdown_timeout
        worker.wait_for_soft_shutdown = functools.partial(self._shut_down, worker, timeout)

    def _shut_down(self, worker: Any, timeout: float) -> None:
        # First stop consuming: jobs that arrive meanwhile would only wait here.
        if worker.consumer.task_consumer:
            ignore_errors(worker.consumer, worker.consumer.task_consumer.cancel)
        worker.pool.drain(timeout)


class PoolExitInTime(ExitInTime):
    """The exit watchdog of a worker with our pool."""

    def held(self, worker: Any) -> HeldWork:
        held: HeldWork = worker.pool.held()
        return held

    def abandon(self, worker: Any) -> None:
        worker.pool.abandon()
