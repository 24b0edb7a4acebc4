"""The Celery task that runs a job in the model process: checks, one run by the service, retries, the callback.

The parent process imports this module too: it needs the tasks' names and options, and never loads torch.
"""

from __future__ import annotations

import logging
import random
import time
from typing import Any, NoReturn

from celery import Task, states
from celery.exceptions import Ignore, Retry, TaskPredicate

from config.settings import Settings
from tasks.errors import DeadlineExceeded, Internal, InvalidRequest, JobError
from tasks.idempotency import IdempotencyKeys
from tasks.payloads import Job, parse
from tasks.protocol import ALONE, CONTINUES, HIDDEN, RUN, SUBMITTED_AT
from tasks.redis_keys import results_prefix
from tasks.results import Result
from tasks.routing import priority_for
from tasks.steering import campaign_of
from worker.delivery.callback_policy import check as check_callback
from worker.delivery.recorder import CallbackRecorder, TerminalState
from worker.engine.row import NotBegun
from worker.images.host_limits import HostLimitReached
from worker.jobs.deduplication import FirstStillRuns, first_answer
from worker.jobs.runs import CancellationError, JobContext
from worker.jobs.service import Service
from worker.observability import tracing
from worker.observability.job_fields import note_code
from worker.observability.redaction import log_defect
from worker.queue.campaigns import CampaignStates, CampaignWatch, reader, resent_after_s
from worker.queue.publisher import OneProducerEach
from worker.queue.result_backend import CANCELED, current_submission

logger = logging.getLogger(__name__)


class JobApp(OneProducerEach):
    """A Celery app with the objects that its tasks need."""

    settings: Settings
    #: Records the callbacks of jobs that have ended, in both processes.
    recorder: CallbackRecorder
    #: What users want of campaigns: in the model process, and in the parent.
    campaigns: CampaignStates
    campaign_watch: CampaignWatch
    #: Runs jobs; only in the model process, once the model is loaded.
    service: Service | None = None
    #: In the log: `parent` or `model`.
    process_name = "parent"

    def __init__(self, name: str, settings: Settings, **options: Any) -> None:
        super().__init__(name, **options)
        self.settings = settings
        self.recorder = CallbackRecorder(self, settings)
        self.campaigns = CampaignStates(reader(self))
        self.campaign_watch = CampaignWatch(reader(self))

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Celery's, with a priority that the receiver reads: a producer's own worker reads only four of the ten."""
        if "priority" in options:
            options["priority"] = priority_for(name, options["priority"])
        return super().send_task(name, *args, **options)


class RunCanceled(Ignore):  # type: ignore[misc]
    """Ends a run whose job was canceled. The parent process revokes the job and stores its result so far."""

    def __init__(self, partial: Result | None = None) -> None:
        # Not an argument of the exception: arguments are logged.
        super().__init__()
        self.partial = partial.model_dump(mode="json") if partial else None


class RunReturned(Ignore):  # type: ignore[misc]
    """Ends a run that has not begun, for another worker: the parent process returns the message to the queue."""


class RunParked(Ignore):  # type: ignore[misc]
    """Ends a run that waits for an image's host: the parent process keeps the job, and runs it again."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host


class RunDropped(Ignore):  # type: ignore[misc]
    """Ends a run whose job has a terminal state already: its message is acknowledged, nothing is stored or sent."""


class JobTask(Task):  # type: ignore[misc]
    """Base class of the six tasks. A task's name determines the payload class of its keyword arguments."""

    abstract = True
    app: JobApp
    # Logs and events must not contain answers.
    resultrepr_maxsize = 0
    # A job's end is logged in one line at INFO, whatever its error: it concerns the producer, who reads it in the
    # result. A defect has been logged at ERROR, with its traceback, where it happened.
    throws = (JobError,)

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Celery's, without the arguments in the message's headers. Used for retries."""
        return super().apply_async(*args, **{**HIDDEN, **options})

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Store that the job runs. Raises RunCanceled or RunDropped if it must not run."""
        state = self.backend.start(self.request, is_stored=not self._ignores_result)
        if state == CANCELED:
            raise RunCanceled
        if state is not None:
            # The run that stored it may have died before its side effects.
            self.backend.replay_side_effects(self.request)
            self._drop_run(state)

    def run(self, *args: Any, **arguments: Any) -> dict[str, Any]:
        """Run the job and return its result as JSON. Raises a JobError, or one of Celery's for the tracer."""
        try:
            if args:
                raise InvalidRequest(
                    "The task takes no positional arguments: send the arguments as keywords (kwargs). In Python a link "
                    "that must not get the result before it is signature.si(...)."
                )
            answer = self._answer(parse(self.name, arguments))
        except CancellationError as canceled:
            tracing.note_state(states.REVOKED)
            raise RunCanceled(canceled.partial) from canceled
        except NotBegun:
            raise RunReturned from None
        except RunParked as parked:
            # As below.
            raise parked.with_traceback(None) from None
        except TaskPredicate:
            raise
        except JobError as error:
            if isinstance(error, Internal):
                log_defect(logger, error.__cause__ or error, self.request.id, self.name)
            # Without its traceback, which is of no use and takes Celery a millisecond for each frame to copy.
            raise error.with_traceback(None) from None
        except Exception as error:
            log_defect(logger, error, self.request.id, self.name)
            raise Internal(f"{type(error).__name__} in the worker: its log has the traceback.") from None
        if self.request.callbacks or self.request.chain:
            # Celery sends these before it stores the answer, so before it can know that another run was first.
            self._drop_if_ended()
        return answer.model_dump(mode="json")

    def on_failure(self, exc: BaseException, *_: Any) -> None:
        """Called by Celery's tracer before it logs the failure."""
        note_code(getattr(exc, "code", Internal.code))

    def on_retry(self, exc: BaseException, *_: Any) -> None:
        note_code(getattr(exc, "code", ""))
        tracing.note_state(states.RETRY)

    def after_return(self, state: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Record the callback. Celery calls this once the state is stored."""
        tracing.note_state(state, retval if state == states.SUCCESS else None)
        self._record_callback(kwargs, (state, retval), is_stored=not self._ignores_result)

    def _answer(self, job: Job) -> Result:
        """The answer of the first job with the same idempotency key, or this job's own."""
        self._obey_campaign(job)
        if job.callback:
            check_callback(job.callback, self.app.settings)
        try:
            known = self._first_answer(job) if job.idempotency_key and not self.request.ignore_result else None
        except FirstStillRuns as wait:
            self._reschedule(job, wait.countdown, "the first job with this idempotency_key still ran")
        return known or self._compute(job)

    def _obey_campaign(self, job: Job) -> None:
        """Send the job again later if its campaign is paused. Raises CancellationError if the campaign is canceled."""
        campaign = campaign_of(self.request)
        if campaign is None:
            return
        wanted = self.app.campaigns.wanted(campaign)
        if wanted.state == "canceled":
            raise CancellationError
        if wanted.state == "paused":
            countdown = resent_after_s(time.time() - wanted.since, job.deadline_s)
            self._reschedule(job, countdown, "its campaign was paused")

    def _first_answer(self, job: Job) -> Result | None:
        settings, service = self.app.settings, self.app.service
        queue = (self.request.delivery_info or {}).get("routing_key") or settings.queue
        ttl_s = settings.idempotency_ttl_s or settings.result_ttl_s
        keys = IdempotencyKeys(self.backend.client, ttl_s, queue, results_prefix(self.app))
        return first_answer(job, self.request.id, keys, self.backend, service.model if service else None)

    def _compute(self, job: Job) -> Result:
        service = self.app.service
        if service is None:
            raise Internal("This process has no model: start the worker with `celery -A worker.app worker`.")
        try:
            return service.run(job, self._context())
        except HostLimitReached as wait:
            if wait.may_park:
                raise RunParked(wait.host) from None
            self._drop_if_ended()
            self._reschedule(job, wait.countdown, "it waited for a download slot of an image's host")
        except JobError as error:
            if error.retryable:
                self._drop_if_ended()
                self._retry(error)
            raise

    def _context(self) -> JobContext:
        request = self.request
        return JobContext(
            id=request.id,
            priority=(request.delivery_info or {}).get("priority") or 0,
            submitted_at=request.get(SUBMITTED_AT),
            soft_limit_s=(request.timelimit or [None, None])[1] or self.soft_time_limit,
            retries=request.retries or 0,
            worker=request.hostname,
            is_alone=bool(request.get(ALONE)),
        )

    def _drop_if_ended(self) -> None:
        """Raise RunDropped if another run of the job has ended: this worker may have been frozen or cut off."""
        state = self.backend.terminal_state(self.request.id, current_submission(self.request))
        if state is not None:
            self._drop_run(state)

    def _drop_run(self, state: str) -> NoReturn:
        self._record_callback(self.request.kwargs, (state, None), is_stored=True)
        logger.info("Job %s has ended as %s already: this run is dropped.", self.request.id, state)
        raise RunDropped

    def _reschedule(self, job: Job, countdown: float, why: str) -> NoReturn:
        """Send the job again, due in `countdown` seconds, without using up one of its retries as Celery's retry would.

        Raises Retry, which tells Celery's tracer, or DeadlineExceeded.
        """
        submitted_at = self.request.get(SUBMITTED_AT)
        if job.deadline_s and submitted_at and time.time() > submitted_at + job.deadline_s:
            raise DeadlineExceeded(f"The deadline passed while {why}: allow more time.")
        # The deadline counts from the first submission. The number tells the new message from this one, which the same
        # worker may still hold when it arrives.
        run = (self.request.get(RUN) or 0) + 1
        headers = {**(self.request.headers or {}), SUBMITTED_AT: submitted_at, CONTINUES: True, RUN: run}
        again = self.signature_from_request(countdown=countdown, retries=self.request.retries, headers=headers)
        again.apply_async()
        raise Retry(f"The job runs again later: {why}.", when=countdown)

    def _retry(self, error: JobError) -> NoReturn:
        settings = self.app.settings
        delay_s = settings.retry_backoff_s * 2**self.request.retries * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        # The image's server may ask for a longer delay, within bounds: it may ask for a year.
        wait_s = min(error.retry_after_s or 0.0, settings.image_retry_after_max_s)
        raise self.retry(exc=error, countdown=max(delay_s, wait_s), max_retries=settings.max_retries)

    def _record_callback(self, arguments: dict[str, Any], terminal_state: TerminalState, *, is_stored: bool) -> None:
        request = self.request
        digest = current_submission(request).digest
        self.app.recorder.record(request.id, self.name, arguments, terminal_state, is_stored=is_stored, digest=digest)

    @property
    def _ignores_result(self) -> bool:
        asked = self.request.ignore_result
        return bool(self.ignore_result if asked is None else asked)
