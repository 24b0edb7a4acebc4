"""The Celery app and its six tasks. `celery -A worker.app worker` starts a worker with the settings' defaults.

This module is imported by Celery's parent process too, which never loads torch: the tasks' bodies run in the
model process, which hands its service over with `serve_with`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore, Retry, TaskPredicate
from celery.signals import setup_logging, worker_init

from config.celery import configuration, drop_overrides
from config.settings import load
from tasks.errors import DeadlineExceeded, Internal, InvalidRequest, JobError
from tasks.failed import Bounds
from tasks.idempotency import IdempotencyKeys
from tasks.payloads import DEFAULT_PRIORITY, HIDDEN, PAYLOADS, SUBMITTED_AT, Job, Result, parse
from tasks.redis_keys import results_prefix
from tasks.routing import priority_for
from worker.delivery.policy import check as check_callback
from worker.delivery.recorder import CallbackRecorder, TerminalState
from worker.engine.row import NotBegun
from worker.images.host_limits import HostLimitReached
from worker.jobs.idempotency import FirstStillRuns, first_answer
from worker.jobs.runs import Canceled, JobContext
from worker.jobs.service import Service
from worker.observability import log_setup
from worker.observability.redaction import without_values
from worker.pool import PoolExitInTime, SoftShutdown, refuse_other_pools
from worker.queue.announced_options import AnnouncedOptions
from worker.queue.balance import Balance
from worker.queue.cancellation import Cancellations
from worker.queue.dead_letters import keep_failures
from worker.queue.publisher import OneProducerEach
from worker.queue.refusals import Refusals
from worker.queue.result_backend import CANCELED, asked_of
from worker.queue.transport import use as use_transport

logger = logging.getLogger(__name__)

settings = load()


class _App(OneProducerEach):
    #: Of the callbacks of jobs that have ended.
    recorder: CallbackRecorder

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Celery's. What is sent to a producer's own worker has a priority that it reads."""
        if "priority" in options:
            options["priority"] = priority_for(name, options["priority"])
        return super().send_task(name, *args, **options)


#: What Celery would read in place of our settings: the start of a worker ends with it.
overrides = drop_overrides(os.environ, settings)
app = _App("idefics", amqp="worker.queue.publisher:AMQP", set_as_current=False)
app.conf.update(configuration(settings, settings.queue, DEFAULT_PRIORITY, PAYLOADS))
app.steps["worker"].update([SoftShutdown, Cancellations, PoolExitInTime, Balance, AnnouncedOptions])
failed_bounds = Bounds(settings.failed_max, settings.failed_max_bytes, settings.failed_ttl_s)
app.recorder = CallbackRecorder(app, settings)
use_transport(Refusals(app, failed_bounds), atomic=settings.atomic_take)
keep_failures(app, failed_bounds)

_service: Service | None = None


def serve_with(service: Service) -> None:
    """Let the tasks of this process run on a service."""
    global _service
    _service = service


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def _set_up_logging(logfile: str | None = None, **_: Any) -> None:
    log_setup.set_up(settings.log_level, logfile)


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _refuse_other_setups(sender: Any, **_: Any) -> None:
    # Celery's signals are the process's, and it may have another app's worker.
    if sender.app is app:
        if overrides:
            sys.exit(overrides)
        refuse_other_pools(sender)


class JobCanceled(Ignore):  # type: ignore[misc]
    """Leaves the job's state to the parent process, which revokes it and stores its result so far."""

    def __init__(self, partial: Result | None = None) -> None:
        # Not among the arguments: those are logged.
        super().__init__()
        self.partial = partial.model_dump(mode="json") if partial else None


class JobReturned(Ignore):  # type: ignore[misc]
    """Leaves the job to another worker: its message goes back as it came."""


class AlreadyEnded(Ignore):  # type: ignore[misc]
    """Has the message acknowledged, and nothing stored or sent."""


class JobTask(Task):  # type: ignore[misc]
    """One of the six: its name says which payload its keyword arguments are."""

    abstract = True
    Request = "worker.pool.request:JobRequest"
    # Logs and events say that a job succeeded, and not what it answered.
    resultrepr_maxsize = 0
    # One line at INFO: it is for the producer, who reads it in the result.
    throws = log_setup.EXPECTED

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Celery's, for retries and whatever else this process sends."""
        return super().apply_async(*args, **{**HIDDEN, **options})

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Store that the job runs, and leave it where it is canceled or has ended in another run."""
        kept = self.backend.start(self.request, is_stored=not self._ignores_result)
        if kept == CANCELED:
            raise JobCanceled
        if kept is not None:
            # The run that stored it may have died right then.
            self.backend.replay_side_effects(self.request)
            self._leave_to_another_run(kept)

    def run(self, *args: Any, **arguments: Any) -> dict[str, Any]:
        try:
            if args:
                raise InvalidRequest(
                    "The task takes no positional arguments: send the arguments as keywords (kwargs). In Python a link "
                    "that must not get the result before it is signature.si(...)."
                )
            answer = self._answer(parse(self.name, arguments))
        except Canceled as canceled:
            raise JobCanceled(canceled.partial) from canceled
        except NotBegun:
            raise JobReturned from None
        except TaskPredicate:
            raise
        except JobError as error:
            # Without the frames that it came through: Celery takes a millisecond to copy one, and they tell nothing.
            raise error.with_traceback(None) from None
        except Exception as error:
            logger.error("Job %s hit a defect; it fails as internal: %s", self.request.id, without_values(error))
            raise Internal(f"{type(error).__name__} in the worker: its log has the traceback.") from None
        if self.request.callbacks or self.request.chain:
            # Celery sends these before it stores the answer, so before it can know that another run was first.
            self._leave_if_ended()
        return answer.model_dump(mode="json")

    def _answer(self, job: Job) -> Result:
        if job.callback:
            check_callback(job.callback, settings)
        try:
            known = self._first_answer(job) if job.idempotency_key and not self.request.ignore_result else None
        except FirstStillRuns as wait:
            self._look_again(job, wait.countdown, "the first job with this idempotency_key still ran")
        return known or self._compute(job)

    def _compute(self, job: Job) -> Result:
        if _service is None:
            raise Internal("This process holds no model: start the worker with `celery -A worker.app worker`.")
        request = self.request
        context = JobContext(
            id=request.id,
            priority=(request.delivery_info or {}).get("priority") or 0,
            submitted_at=request.get(SUBMITTED_AT),
            soft_limit_s=(request.timelimit or [None, None])[1] or self.soft_time_limit,
        )
        try:
            return _service.run(job, context)
        except HostLimitReached as wait:
            self._leave_if_ended()
            self._look_again(job, wait.countdown, "it waited for a download slot of an image's host")
        except JobError as error:
            if error.retryable:
                self._leave_if_ended()
                self._retry(error)
            raise

    def _leave_if_ended(self) -> None:
        """Raise AlreadyEnded where another run of this job has ended it: a worker may have been frozen or cut off."""
        end = self.backend.terminal_state(self.request.id, asked_of(self.request))
        if end is not None:
            self._leave_to_another_run(end)

    def _leave_to_another_run(self, end: str) -> NoReturn:
        self._announce(self.request.id, self.request.kwargs, (end, None), is_stored=True)
        logger.info("Job %s has ended as %s already: this run is dropped.", self.request.id, end)
        raise AlreadyEnded

    def _first_answer(self, job: Job) -> Result | None:
        queue = (self.request.delivery_info or {}).get("routing_key") or settings.queue
        ttl_s = settings.idempotency_ttl_s or settings.result_ttl_s
        keys = IdempotencyKeys(self.backend.client, ttl_s, queue, results_prefix(self.app))
        return first_answer(job, self.request.id, keys, self.backend, _service.model if _service else None)

    def _look_again(self, job: Job, countdown: float, why: str) -> NoReturn:
        """As Celery's retry, which would use one of the job's retries up."""
        submitted_at = self.request.get(SUBMITTED_AT)
        if job.deadline_s and submitted_at and time.time() > submitted_at + job.deadline_s:
            raise DeadlineExceeded(f"The deadline passed while {why}: allow more time.")
        # The deadline goes on from the first submission.
        headers = {**(self.request.headers or {}), SUBMITTED_AT: submitted_at}
        again = self.signature_from_request(countdown=countdown, retries=self.request.retries, headers=headers)
        again.apply_async()
        raise Retry(f"The job comes again: {why}.", when=countdown)

    def after_return(self, state: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self._announce(task_id, kwargs, (state, retval), is_stored=not self._ignores_result)

    def _announce(self, id: str, arguments: dict[str, Any], end: TerminalState, *, is_stored: bool) -> None:
        asked = asked_of(self.request).digest
        self.app.recorder.record(id, self.name, arguments, end, is_stored=is_stored, asked=asked)

    @property
    def _ignores_result(self) -> bool:
        asked = self.request.ignore_result
        return bool(self.ignore_result if asked is None else asked)

    def _retry(self, error: JobError) -> NoReturn:
        delay = settings.retry_backoff_s * 2**self.request.retries * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        raise self.retry(
            exc=error,
            # What the image's server asked for, within bounds: it may ask for a year.
            countdown=max(delay, min(error.retry_after_s or 0.0, settings.image_retry_after_max_s)),
            max_retries=settings.max_retries,
        )


for _name, _payload in PAYLOADS.items():
    app.register_task(type(_payload.__name__, (JobTask,), {"name": _name, "__doc__": _payload.__doc__})())

# Celery's built-in tasks run what a message tells them to: any task, and an end of any job.
for _name in set(app.tasks) - PAYLOADS.keys():
    app.tasks.pop(_name)
