"""The client's blocking calls: submit jobs, read their results, inspect the queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Unpack

from celery import Celery
from kombu.exceptions import OperationalError

from .apps import app_at, app_beside, reach
from .broker_errors import with_our_errors
from .bulk import Bulk, OnSent, ignore_sent
from .capacity import Capacity
from .errors import ConfigurationError, from_broker
from .failed import FailedJob, FailedJobs
from .model_directory import ModelDirectory
from .outcomes import Outcome
from .payloads import Job
from .protocol import DEFAULT_PRIORITY, MAX_JOB_BYTES, QUEUE
from .results import Result
from .setup_check import setup_check_of
from .stored_results import forget, read_outcomes
from .submission import Sent, SubmitOptions, Submitter
from .submitted_job import Status, SubmittedJob
from .worker_registry import ServedModel


class BlockingClient:
    """The blocking calls of Client, which adds a variant of each for asyncio."""

    def __init__(
        self,
        broker_url: str | None = None,
        *,
        result_backend: str | None = None,
        app: Celery | None = None,
        queue: str | None = None,
        model: str | None = None,
        max_queued: int | None = 100_000,
        max_memory: float | None = 0.8,
        check_callbacks: bool = True,
        max_job_bytes: int = MAX_JOB_BYTES,
    ) -> None:
        """`result_backend` defaults to the database after the broker's, as the worker's settings do.

        Where several models share a broker, each has a queue of its own, the workers' IDEFICS_QUEUE. `model` is the
        name of the one that answers, its queue's without `idefics.`, or its id; `models` lists those that are served.
        `queue` is a queue itself, also one that no worker has taken from yet; by default `idefics`.

        `submit` raises QueueFull if `max_queued` jobs wait, or if the broker has used more than the share `max_memory`
        of its maxmemory: a full broker cannot take results either. None: no limit. It raises InvalidRequest for a job
        of more than `max_job_bytes`: the worker's IDEFICS_MAX_JOB_BYTES less 100,000 for what Celery adds.

        `check_callbacks` refuses, before a job is sent, callbacks that workers with default settings refuse. Turn it
        off if your operator allows http, other ports or private networks.
        """
        if app is not None and (broker_url or result_backend):
            raise ConfigurationError("Give a Celery app or URLs, not both: the app has its own URLs.")
        _refuse_both(queue, model)
        try:
            self._app = app_beside(app) if app is not None else app_at(broker_url, result_backend)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        #: The given app, or one for the URLs.
        self.app = app if app is not None else self._app
        #: Whether it was made for a queue or a model: then a batch's lines go there, whatever model they name.
        self.is_bound = queue is not None or model is not None
        self._queue = queue or QUEUE
        self._model = model
        self._models = ModelDirectory(self._app)
        self._capacity = Capacity(self._app, max_queued, max_memory)
        self._setup_check = setup_check_of(self._app)
        self._submitter = Submitter(
            self._app, self._capacity, check_callbacks=check_callbacks, max_job_bytes=max_job_bytes
        )

    @property
    def queue(self) -> str:
        """Where its jobs go. Raises ModelNotFound for a client of a model that no worker serves."""
        return self._queue_of(None)

    @with_our_errors
    def _queue_of(self, model: str | None) -> str:
        """Of a model, or of the client's own."""
        model = self._model if model is None else model
        return self._queue if model is None else self._models.queue_of(model)

    @with_our_errors
    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> SubmittedJob:
        """Queue a job. Priority 0 is first and 9 last; `options` are those of Celery's `apply_async`, or a `model`.

        With an `idempotency_key` that has a job already, that job is returned and nothing queued; raises InvalidRequest
        where it has another payload. Raises QueueFull where the broker has no room, InvalidRequest for a callback
        that may not be called, ModelNotFound for a model that no worker has served for a day, and ConfigurationError
        where the broker's workers would not see this app's jobs.
        """
        return self._submit(job, priority, {**options})

    def _submit(self, job: Job, priority: int, options: dict[str, Any]) -> SubmittedJob:
        sent = self._send(job, priority, options)
        response_model = getattr(job, "response_model", None)
        return SubmittedJob(self.app.AsyncResult(sent.id), sent.queue, self._app, response_model, priority)

    def _send(self, job: Job, priority: int, options: dict[str, Any]) -> Sent:
        model, queue = options.pop("model", None), options.pop("queue", None)
        _refuse_both(queue, model)
        return self._submitter.submit(job, self._queue_of(model) if queue is None else queue, priority, options)

    @with_our_errors
    def submit_many(
        self, jobs: Iterable[Job], *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]
    ) -> list[SubmittedJob]:
        """Queue jobs over one connection, in order. Any error that it raises has the jobs `submitted` before it."""
        submitted: list[SubmittedJob] = []
        with self._app.producer_pool.acquire(block=True) as producer:
            try:
                for job in jobs:
                    submitted.append(self._submit(job, priority, {**options, "producer": producer}))
            except Exception as error:
                error.submitted = submitted  # type: ignore[attr-defined]
                raise
        return submitted

    @contextlib.contextmanager
    def bulk(self, on_sent: OnSent = ignore_sent) -> Iterator[Bulk]:
        """Jobs with options of their own, which are sent together: a hundred take little more than one.

        ```python
        with client.bulk() as bulk:
            for row in rows:
                bulk.submit(Caption(image=row.url), task_id=row.id)
        ```

        They are sent in order, each time that a hundred jobs or a megabyte are collected, and the rest at the end of
        the block, also where an error ends it. `on_sent` is called with the number of jobs that were sent. Jobs with an
        `idempotency_key` are sent one by one. Celery's signal `after_task_publish` is sent when a job is collected.
        """
        with self._app.producer_pool.acquire(block=True) as producer:
            bulk = Bulk(self._send, producer, on_sent)
            try:
                yield bulk
            finally:
                bulk.flush()

    def ping(self) -> None:
        """Raises BrokerUnavailable (a ConnectionError) if the broker cannot be reached within seconds.

        So does every other call, except that waiting for a result continues through a restart of Redis.
        """
        try:
            with self._app.connection_for_write() as connection:
                reach(connection)
        except OperationalError as error:
            raise from_broker(error) from None

    def job(self, id: str) -> SubmittedJob:
        """A job submitted earlier."""
        # The queue is named where there is no answer: it is not asked for here.
        return SubmittedJob(self.app.AsyncResult(id), self._queue if self._model is None else None, self._app)

    def status(self, id: str) -> Status:
        """The status of a job submitted earlier; see SubmittedJob.status."""
        return self.job(id).status

    def result(self, id: str, timeout: float | None = None) -> Result:
        """The answer to a job submitted earlier; see SubmittedJob.result."""
        return self.job(id).result(timeout)

    def cancel(self, id: str) -> None:
        """Cancel a job; see SubmittedJob.cancel."""
        self.job(id).cancel()

    @with_our_errors
    def outcomes(self, ids: Iterable[str]) -> dict[str, Outcome]:
        """The outcomes of the jobs among these that have ended, read in one command."""
        return read_outcomes(self._app, ids)

    @with_our_errors
    def forget(self, ids: Iterable[str]) -> None:
        """Delete these jobs' results, which otherwise stay in Redis until they expire."""
        forget(self._app, ids)

    @with_our_errors
    def queued(self, priority: int | None = None, *, model: str | None = None) -> int:
        """Jobs that wait in the queue, or in a model's: all or with one priority. Raises BrokerUnavailable where the
        broker is away.

        Jobs that a worker has set aside until their time (`eta`, `countdown`) are not counted.
        """
        return self._capacity.queued(self._queue_of(model), priority)

    @with_our_errors
    def workers(self, *, model: str | None = None) -> list[str]:
        """Names of the workers that take from the client's queue, or from a model's, for a health route: empty where
        jobs would wait.

        A killed worker is listed for up to 15 seconds more. Raises BrokerUnavailable if the broker is away, and
        ConfigurationError if it is not Redis.
        """
        return self._setup_check.workers(self._queue_of(model))

    @with_our_errors
    def models(self) -> list[ServedModel]:
        """The models that workers serve, each with its name, its id and its queue.

        One whose last worker has ended is listed for up to 15 seconds more. Raises as `workers` does.
        """
        return self._models.served()

    def failed(self) -> Iterator[FailedJob]:
        """The failed jobs that the workers still keep, the oldest first."""
        return _each(iter(FailedJobs(self._app)))

    @with_our_errors
    def retry(self, id: str, *, queue: str | None = None) -> SubmittedJob:
        """Send a failed job again, with its id, links and chain. Raises NotFound (a LookupError) if it is not kept.

        `queue`: the queue to send it to, for one of your own tasks that was sent to our queue by mistake.
        """
        jobs = FailedJobs(self._app)
        jobs.retry(jobs.get(id), queue)
        return self.job(id)


def _refuse_both(queue: Any, model: str | None) -> None:
    if queue is not None and model is not None:
        raise ConfigurationError("Give a queue or a model, not both: a model's jobs go to the queue of its workers.")


def _each(jobs: Iterator[FailedJob]) -> Iterator[FailedJob]:
    read = with_our_errors(next)
    while (job := read(jobs, None)) is not None:
        yield job
