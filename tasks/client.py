"""The producers' client: typed payloads in, typed results out, over any Celery app or a broker URL."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack

from celery import Celery, states, uuid
from celery.backends.redis import RedisBackend
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .apps import app_at, app_beside, reach
from .availability import is_full
from .capacity import Capacity
from .errors import (
    ConfigurationError,
    IdeficsError,
    Internal,
    JobCanceled,
    JobTimeout,
    QueueFull,
    from_broker,
    from_exception,
)
from .failed import FailedJob, FailedJobs
from .idempotency import IdempotencyKeys
from .outcomes import Outcome
from .payloads import Job, check_size
from .protocol import CANCEL_TTL_S, DEFAULT_PRIORITY, HIDDEN, MAX_JOB_BYTES, QUEUE, SUBMITTED_AT
from .redis_keys import CANCELLATION, results_prefix
from .results import Result
from .webhooks import check_public
from .worker_options import setup_of, unreadable

#: Seconds between two looks at a result: short at first, since most jobs end within a second; then an answer waits for
#: a tenth of its time at most.
FIRST_PAUSE_S, LAST_PAUSE_S, PAUSE_GROWTH = 0.01, 0.25, 1.1
#: Seconds that a wait bears with results' Redis that is away: it restarts within them.
AWAY_S = 60.0
#: Seconds between two looks of a wait at whether its answer can come.
CHECK_S = 2.0

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]

_STATUS: dict[str, Status] = {
    states.PENDING: "starting",
    states.RECEIVED: "starting",
    states.STARTED: "processing",
    states.RETRY: "processing",
    states.SUCCESS: "succeeded",
    states.FAILURE: "failed",
    states.REVOKED: "canceled",
}


class SubmitOptions(TypedDict, total=False):
    """Options of Celery's `apply_async` that a job may have."""

    #: The job's id, else a random one.
    task_id: str
    #: Else the client's.
    queue: str
    #: Seconds before it starts, or when.
    countdown: float
    eta: datetime
    #: Seconds, or when: a job that has not started by then does not start.
    expires: float | datetime
    #: Signatures of tasks that run at its end, with its result; and where it failed, with its id.
    link: Any
    link_error: Any
    headers: dict[str, Any]
    #: Seconds that it may run.
    time_limit: float
    soft_time_limit: float
    #: Whether, and how, its message is sent again where the broker is away: see Celery's `retry_policy`.
    retry: bool
    retry_policy: dict[str, Any]
    ignore_result: bool
    compression: str
    shadow: str
    add_to_parent: bool
    group_id: str
    root_id: str
    parent_id: str


P = ParamSpec("P")
R = TypeVar("R")


def _with_our_errors(method: Callable[P, R]) -> Callable[P, R]:
    """A method that raises nothing of Redis's or kombu's that is not an IdeficsError too."""

    @functools.wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return method(*args, **options)
        except IdeficsError:
            raise
        except (OperationalError, RedisError) as error:
            ours = from_broker(error)
            if hasattr(error, "submitted"):
                ours.submitted = error.submitted  # type: ignore[attr-defined]
            raise ours from error

    return call


def _with_results(app: Celery) -> Any:
    """An app's result backend. Raises ConfigurationError where it has none that workers answer at."""
    if wrong := unreadable(app.backend):
        raise ConfigurationError(wrong)
    return app.backend


class SubmittedJob:
    """A job on its way. Keep its `id`: `Client.job(id)` finds it again from any process."""

    def __init__(self, outcome: AsyncResult[Any], queue: str = QUEUE, app: Celery | None = None) -> None:
        """`app`: the one to ask by, where it is not the handle's own."""
        #: Celery's own handle, for whatever Celery can do.
        self.async_result = outcome
        self.id: str = outcome.id
        self._queue = queue
        self._app: Celery = app or outcome.app

    def __repr__(self) -> str:
        return f"SubmittedJob({self.id!r})"

    @property
    @_with_our_errors
    def status(self) -> Status:
        """`starting` (it waits), `processing` (it runs or is retried), `succeeded`, `failed` or `canceled`.

        `starting` also stands for an id that nobody has submitted, since Celery cannot tell them apart, and for a job
        that was canceled and that no worker has met since.

        Raises ConfigurationError where the app's results are not the workers'.
        """
        state = _with_results(self._app).get_task_meta(self.id)["status"]
        if state == states.PENDING:
            setup_of(self._app).check_reading()
        return _STATUS.get(state, "processing")

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answer, at most `timeout` seconds. A wait outlasts a restart of Redis.

        Raises the job's JobError, JobCanceled, or JobTimeout (a TimeoutError), after which the job goes on;
        BrokerUnavailable where Redis is away when the time is over, or for a minute; ConfigurationError where the
        app's options are not the workers', so that no answer can come.
        """
        wait = _Wait(self._app, self.id, self._queue, timeout)
        while (outcome := wait.look()) is None:
            time.sleep(wait.pause_s())
        return _answer(outcome)

    async def aresult(self, timeout: float | None = None) -> Result:
        """`result` for asyncio: no thread waits meanwhile."""
        wait = _Wait(self._app, self.id, self._queue, timeout)
        while (outcome := await asyncio.to_thread(wait.look)) is None:
            await asyncio.sleep(wait.pause_s())
        return _answer(outcome)

    async def astatus(self) -> Status:
        """`status` for asyncio."""
        return await asyncio.to_thread(lambda: self.status)

    async def acancel(self) -> None:
        """`cancel` for asyncio."""
        await asyncio.to_thread(self.cancel)

    @_with_our_errors
    def cancel(self) -> None:
        """Take the job back: it does not start, or ends at its next step, and JobCanceled has its text so far."""
        # The key reaches workers that are not there yet, and needs no right to Celery's mailbox; that one is faster.
        is_noted = self._note_cancellation()
        try:
            self._app.control.revoke(self.id, terminate=True)
        except (OperationalError, RedisError):
            if not is_noted:
                raise

    def _note_cancellation(self) -> bool:
        backend = self._app.backend
        if not isinstance(backend, RedisBackend):
            return False
        try:
            name = results_prefix(self._app) + CANCELLATION.named(self.id)
            backend.client.set(name, 1, ex=CANCEL_TTL_S)
        except RedisError:
            return False
        return True


class _Wait:
    """For a job's end, by looking again and again, with growing pauses.

    AsyncResult.get() waits on one subscription for all results of a process, which threads that wait at the same time
    (a web server's) take from each other.
    """

    def __init__(self, app: Celery, id: str, queue: str, timeout: float | None) -> None:
        self._app = app
        self._id = id
        self._queue = queue
        self._timeout = timeout
        self._pause_s = FIRST_PAUSE_S
        self._setup = setup_of(app)
        now = time.monotonic()
        self._end = math.inf if timeout is None else now + timeout
        self._answered_at = now
        #: What the last look met, where Redis is away.
        self._away: RedisError | None = None
        self._checked_at = now

    @_with_our_errors
    def look(self) -> Outcome | None:
        """What it ended with, if it has.

        Raises JobTimeout where the time is over, BrokerUnavailable where Redis is away then or has been for AWAY_S,
        and ConfigurationError where no answer can come.
        """
        outcome = self._outcome()
        if outcome is None:
            self._check()
        return outcome

    def _check(self) -> None:
        now = time.monotonic()
        if self._away is not None and (now >= self._end or now - self._answered_at > AWAY_S):
            raise self._away
        if now >= self._end:
            why = self._setup.why_no_answer(self._queue)
            raise JobTimeout(f"Job {self._id} has no answer after {self._timeout} s, and goes on. {why}")
        if now - self._checked_at >= CHECK_S:
            self._checked_at = now
            self._setup.check_reading()

    def _outcome(self) -> Outcome | None:
        try:
            meta: dict[str, Any] = _with_results(self._app).get_task_meta(self._id)
        except (RedisConnectionError, RedisTimeoutError) as error:
            self._away = error
            return None
        self._away, self._answered_at = None, time.monotonic()
        return _outcome(meta) if meta["status"] in states.READY_STATES else None

    def pause_s(self) -> float:
        """Seconds until the next look."""
        pause, self._pause_s = self._pause_s, min(self._pause_s * PAUSE_GROWTH, LAST_PAUSE_S)
        return min(pause, max(0.0, self._end - time.monotonic()))


class Client:
    """Submits jobs to the workers of a broker.

    Give it the broker's URL, or a Celery app of yours, whose settings it then has, with connections of its own. Safe to
    share between threads.
    """

    def __init__(
        self,
        broker_url: str | None = None,
        *,
        result_backend: str | None = None,
        app: Celery | None = None,
        queue: str = QUEUE,
        max_queued: int | None = 100_000,
        max_memory: float | None = 0.8,
        check_callbacks: bool = True,
        max_job_bytes: int = MAX_JOB_BYTES,
    ) -> None:
        """`result_backend` defaults to the database after the broker's, as the worker's settings do.

        `queue` is that of the model that answers, where several share a broker: the workers' IDEFICS_QUEUE.

        `submit` raises QueueFull where `max_queued` jobs wait, or where the broker has used more than `max_memory` of
        its maxmemory: a broker that is full cannot take results either. None: no limit. It raises InvalidRequest for a
        job of more than `max_job_bytes`: the worker's IDEFICS_MAX_JOB_BYTES less 100,000 for what Celery adds.

        `check_callbacks` refuses, before it sends a job, a callback that workers with default settings refuse: turn it
        off where your operator allows http, other ports or private networks.
        """
        if app is not None and (broker_url or result_backend):
            raise ConfigurationError("Give a Celery app or URLs, not both: the app has URLs of its own.")
        try:
            self._app = app_beside(app) if app is not None else app_at(broker_url, result_backend)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        #: Yours, or one for the URLs.
        self.app = app if app is not None else self._app
        self._queue = queue
        self._max_job_bytes = max_job_bytes
        self._capacity = Capacity(self._app, max_queued, max_memory)
        self._setup = setup_of(self._app)
        self._check_callbacks = check_callbacks

    @property
    def queue(self) -> str:
        """Where its jobs go."""
        return self._queue

    @_with_our_errors
    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> SubmittedJob:
        """Queue a job. Priority 0 is first and 9 last; `options` are those of Celery's `apply_async`.

        With an `idempotency_key` that has a job already, that job is returned and nothing queued; raises InvalidRequest
        where it has another payload. Raises QueueFull where the broker has no room, InvalidRequest for a callback
        that may not be called, and ConfigurationError where the broker's workers would not see this app's jobs.
        """
        return self._submit(job, priority, {**options})

    def _submit(self, job: Job, priority: int, options: dict[str, Any]) -> SubmittedJob:
        if self._check_callbacks and job.callback is not None:
            check_public(job.callback)
        check_size(job, self._max_job_bytes)
        if job.idempotency_key is None or not isinstance(self._app.backend, RedisBackend):
            # Where the results are not in Redis, the workers hold to the key alone.
            return self._send(job, priority, options)
        queue, backend = options.get("queue", self._queue), self._app.backend
        keys = IdempotencyKeys(
            backend.client, backend.expires, getattr(queue, "name", queue), results_prefix(self._app)
        )
        claim = keys.claim(job, options.pop("task_id", None) or uuid(), is_sent=False)
        if claim.is_started and self._app.backend.get_task_meta(claim.id, cache=False)["status"] == states.PENDING:
            claim = keys.claim_again(job, claim)
        if claim.is_sent:
            return self.job(claim.id)
        submitted = self._send(job, priority, {**options, "task_id": claim.id})
        keys.confirm(job, claim)
        return submitted

    def _send(self, job: Job, priority: int, options: dict[str, Any]) -> SubmittedJob:
        queue = options.pop("queue", self._queue)
        self._capacity.take(queue)
        self._setup.check_sending()
        try:
            outcome = self._app.send_task(
                job.task,
                kwargs=job.arguments(),
                queue=queue,
                priority=priority,
                # Whatever the app's default: the workers read nothing else.
                serializer="json",
                headers={SUBMITTED_AT: time.time(), **options.pop("headers", {})},
                **HIDDEN,
                **options,
            )
        except (OperationalError, ResponseError) as error:
            if is_full(error):
                raise QueueFull(
                    f"The broker is full and refused the job ({error}): submit it later, add workers, "
                    "or give the server more memory or disk."
                ) from error
            raise
        return SubmittedJob(self.app.AsyncResult(outcome.id), getattr(queue, "name", queue), self._app)

    @_with_our_errors
    def submit_many(
        self, jobs: Iterable[Job], *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]
    ) -> list[SubmittedJob]:
        """Queue jobs over one connection, in order. Whatever it raises holds those `submitted` before it."""
        submitted: list[SubmittedJob] = []
        with self._app.producer_pool.acquire(block=True) as producer:
            try:
                for job in jobs:
                    submitted.append(self._submit(job, priority, {**options, "producer": producer}))
            except Exception as error:
                error.submitted = submitted  # type: ignore[attr-defined]
                raise
        return submitted

    def ping(self) -> None:
        """Raises BrokerUnavailable (a ConnectionError) where the broker cannot be reached in seconds.

        So does every other call, but that a wait for a result outlasts a restart of Redis.
        """
        try:
            with self._app.connection_for_write() as connection:
                reach(connection)
        except OperationalError as error:
            raise from_broker(error) from None

    def job(self, id: str) -> SubmittedJob:
        """A job submitted earlier."""
        return SubmittedJob(self.app.AsyncResult(id), self._queue, self._app)

    def status(self, id: str) -> Status:
        """How far a job submitted earlier is; see SubmittedJob.status."""
        return self.job(id).status

    def result(self, id: str, timeout: float | None = None) -> Result:
        """The answer to a job submitted earlier; see SubmittedJob.result."""
        return self.job(id).result(timeout)

    def cancel(self, id: str) -> None:
        """Take a job back; see SubmittedJob.cancel."""
        self.job(id).cancel()

    @_with_our_errors
    def outcomes(self, ids: Iterable[str]) -> dict[str, Outcome]:
        """What those of these jobs that have ended ended with, read at once."""
        asked, backend = list(ids), _with_results(self._app)
        if not asked:
            return {}
        if isinstance(backend, RedisBackend):
            found = backend.client.mget([backend.get_key_for_task(id) for id in asked])
            metas = [raw and backend.meta_from_decoded(backend.decode(raw)) for raw in found]
        else:
            metas = [backend.get_task_meta(id, cache=False) for id in asked]
        ended = {
            id: meta for id, meta in zip(asked, metas, strict=True) if meta and meta["status"] in states.READY_STATES
        }
        return {id: _outcome(meta) for id, meta in ended.items()}

    @_with_our_errors
    def forget(self, ids: Iterable[str]) -> None:
        """Delete these jobs' results, which would else lie in Redis until they expire."""
        backend = self._app.backend
        if not isinstance(backend, RedisBackend):
            for id in ids:
                backend.forget(id)
            return
        keys = {id: backend.get_key_for_task(id) for id in ids}
        if keys:
            backend.client.delete(*keys.values())
        for id in keys:
            backend.result_consumer.cancel_for(id)

    @_with_our_errors
    def queued(self, priority: int | None = None) -> int:
        """Jobs that wait in the queue, all or with one priority. Raises BrokerUnavailable where the broker is away.

        Those that a worker has met before their time (`eta`, `countdown`) are not among them.
        """
        return self._capacity.queued(self._queue, priority)

    @_with_our_errors
    def workers(self) -> list[str]:
        """Names of the workers that take from the client's queue, for a health route: empty where jobs would wait.

        One that was killed is listed for up to 15 seconds more. Raises BrokerUnavailable where the broker is away, and
        ConfigurationError where it is no Redis.
        """
        return self._setup.workers(self._queue)

    def failed(self) -> Iterator[FailedJob]:
        """The jobs that failed, the oldest first, as far as the workers' bounds keep them."""
        return _each_with_our_errors(iter(FailedJobs(self._app)))

    @_with_our_errors
    def retry(self, id: str, *, queue: str | None = None) -> SubmittedJob:
        """Send a failed job again: it keeps its id, links and chain. Raises NotFound (a LookupError) where it is not
        kept.

        `queue`: where to, for a task of your own that was sent to our queue by mistake.
        """
        jobs = FailedJobs(self._app)
        jobs.retry(jobs.get(id), queue)
        return self.job(id)

    async def asubmit(
        self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]
    ) -> SubmittedJob:
        """`submit` for asyncio."""
        return await asyncio.to_thread(functools.partial(self.submit, job, priority=priority, **options))

    async def asubmit_many(
        self, jobs: Iterable[Job], *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]
    ) -> list[SubmittedJob]:
        """`submit_many` for asyncio."""
        return await asyncio.to_thread(functools.partial(self.submit_many, list(jobs), priority=priority, **options))

    async def aresult(self, id: str, timeout: float | None = None) -> Result:
        """`result` for asyncio."""
        return await self.job(id).aresult(timeout)

    async def astatus(self, id: str) -> Status:
        """`status` for asyncio."""
        return await self.job(id).astatus()

    async def acancel(self, id: str) -> None:
        """`cancel` for asyncio."""
        await self.job(id).acancel()

    async def aoutcomes(self, ids: Iterable[str]) -> dict[str, Outcome]:
        """`outcomes` for asyncio."""
        return await asyncio.to_thread(self.outcomes, list(ids))

    async def aforget(self, ids: Iterable[str]) -> None:
        """`forget` for asyncio."""
        await asyncio.to_thread(self.forget, list(ids))

    async def aqueued(self, priority: int | None = None) -> int:
        """`queued` for asyncio."""
        return await asyncio.to_thread(self.queued, priority)

    async def aworkers(self) -> list[str]:
        """`workers` for asyncio."""
        return await asyncio.to_thread(self.workers)

    async def aping(self) -> None:
        """`ping` for asyncio."""
        await asyncio.to_thread(self.ping)

    async def afailed(self) -> list[FailedJob]:
        """`failed` for asyncio."""
        return await asyncio.to_thread(lambda: list(self.failed()))

    async def aretry(self, id: str, *, queue: str | None = None) -> SubmittedJob:
        """`retry` for asyncio."""
        return await asyncio.to_thread(functools.partial(self.retry, id, queue=queue))


def _each_with_our_errors(jobs: Iterator[FailedJob]) -> Iterator[FailedJob]:
    read = _with_our_errors(next)
    while (job := read(jobs, None)) is not None:
        yield job


def _outcome(meta: dict[str, Any]) -> Outcome:
    """What the record of a job that has ended says."""
    if meta["status"] == states.REVOKED:
        return JobCanceled(partial=_partial(meta["result"]))
    if isinstance(meta["result"], BaseException):
        return from_exception(meta["result"])
    try:
        return Result.model_validate(meta["result"])
    except ValidationError:
        return Internal("What is stored is no result of one of the six tasks: check the id.", detail="foreign_result")


def _answer(outcome: Outcome) -> Result:
    if isinstance(outcome, Result):
        return outcome
    raise outcome


def _partial(revoked: BaseException) -> Result | None:
    """What the worker stored with a revocation: Celery's reason, and the text so far where there was one."""
    return Result.model_validate(revoked.args[1]) if len(revoked.args) > 1 else None
