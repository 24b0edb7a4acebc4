"""The producers' client: typed payloads in, typed results out, over any Celery app or a broker URL."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar

from celery import Celery, states, uuid
from celery.backends.redis import RedisBackend
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

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
from .payloads import (
    CANCEL_KEY,
    CANCEL_TTL_S,
    DEFAULT_PRIORITY,
    HIDDEN,
    MAX_JOB_BYTES,
    QUEUE,
    SUBMITTED_AT,
    Job,
    Outcome,
    Result,
    check_size,
)
from .redis_keys import results_prefix
from .redis_urls import SCHEMES, Server, result_server, results_beside, server
from .webhooks import check_public
from .worker_options import setup_of, unreadable

#: Seconds between two looks at a result: short at first, since most jobs end within a second; then an answer waits for
#: a tenth of its time at most.
FIRST_PAUSE_S, LAST_PAUSE_S, PAUSE_GROWTH = 0.01, 0.25, 1.1
#: Seconds that a wait bears with results' Redis that is away: it restarts within them.
AWAY_S = 60.0
#: Seconds between two looks of a wait at whether its answer can come.
CHECK_S = 2.0
#: Seconds without an answer after which a connection is given up: a server that is frozen closes none.
SOCKET_TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 5.0
DEFAULT_BROKER = "redis://localhost:6379/0"

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

    def __init__(self, outcome: AsyncResult[Any], queue: str = QUEUE) -> None:
        #: Celery's own handle, for whatever Celery can do.
        self.async_result = outcome
        self.id: str = outcome.id
        self._queue = queue

    def __repr__(self) -> str:
        return f"SubmittedJob({self.id!r})"

    @property
    @_with_our_errors
    def status(self) -> Status:
        """`starting` also stands for an id that nobody has submitted: Celery cannot tell them apart.

        Raises ConfigurationError where the app's results are not the workers'.
        """
        _with_results(self.async_result.app)
        state = self.async_result.state
        if state == states.PENDING:
            setup_of(self.async_result.app).check_reading()
        return _STATUS.get(state, "processing")

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answer, at most `timeout` seconds.

        Raises the job's JobError, JobCanceled, or JobTimeout (a TimeoutError), after which the job goes on;
        ConfigurationError where the app's options are not the workers', so that no answer can come.
        """
        wait = _Wait(self.async_result, self._queue, timeout)
        while (outcome := wait.look()) is None:
            time.sleep(wait.pause_s())
        return _answer(outcome)

    async def aresult(self, timeout: float | None = None) -> Result:
        """`result` for asyncio: no thread waits meanwhile."""
        wait = _Wait(self.async_result, self._queue, timeout)
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
            self.async_result.revoke(terminate=True)
        except (OperationalError, ResponseError):
            if not is_noted:
                raise

    def _note_cancellation(self) -> bool:
        backend = self.async_result.backend
        if not isinstance(backend, RedisBackend):
            return False
        try:
            name = results_prefix(self.async_result.app) + CANCEL_KEY + self.id
            backend.client.set(name, 1, ex=CANCEL_TTL_S)
        except RedisError:
            return False
        return True


class _Wait:
    """For a job's end, by looking again and again, with growing pauses.

    AsyncResult.get() waits on one subscription for all results of a process, which threads that wait at the same time
    (a web server's) take from each other.
    """

    def __init__(self, job: AsyncResult[Any], queue: str, timeout: float | None) -> None:
        self._job = job
        self._queue = queue
        self._timeout = timeout
        self._pause_s = FIRST_PAUSE_S
        self._setup = setup_of(job.app)
        now = time.monotonic()
        self._end = math.inf if timeout is None else now + timeout
        self._answered_at = now
        self._checked_at = now

    @_with_our_errors
    def look(self) -> Outcome | None:
        """What it ended with, if it has.

        Raises JobTimeout where the time is over, BrokerUnavailable once Redis has been away for AWAY_S, and
        ConfigurationError where no answer can come.
        """
        outcome = self._outcome()
        if outcome is None:
            self._check()
        return outcome

    def _check(self) -> None:
        now = time.monotonic()
        if now >= self._end:
            why = self._setup.why_no_answer(self._queue)
            raise JobTimeout(f"Job {self._job.id} has no answer after {self._timeout} s, and goes on. {why}")
        if now - self._checked_at >= CHECK_S:
            self._checked_at = now
            self._setup.check_reading()

    def _outcome(self) -> Outcome | None:
        try:
            meta: dict[str, Any] = _with_results(self._job.app).get_task_meta(self._job.id)
        except (RedisConnectionError, RedisTimeoutError):
            if time.monotonic() - self._answered_at > AWAY_S:
                raise
            return None
        self._answered_at = time.monotonic()
        return _outcome(meta) if meta["status"] in states.READY_STATES else None

    def pause_s(self) -> float:
        """Seconds until the next look."""
        pause, self._pause_s = self._pause_s, min(self._pause_s * PAUSE_GROWTH, LAST_PAUSE_S)
        return min(pause, max(0.0, self._end - time.monotonic()))


class Client:
    """Submits jobs to the workers of a broker.

    Give it the broker's URL or a Celery app of yours. Safe to share between threads.
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
            self.app = app or _app(broker_url, result_backend)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        self._queue = queue
        self._max_job_bytes = max_job_bytes
        self._capacity = Capacity(self.app, max_queued, max_memory)
        self._setup = setup_of(self.app)
        self._check_callbacks = check_callbacks

    @property
    def queue(self) -> str:
        """Where its jobs go."""
        return self._queue

    @_with_our_errors
    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Any) -> SubmittedJob:
        """Queue a job. Priority 0 is first and 9 last; `options` are those of Celery's `apply_async`.

        With an `idempotency_key` that has a job already, that job is returned and nothing queued; raises InvalidRequest
        where it has another payload. Raises QueueFull where the broker has no room, InvalidRequest for a callback
        that may not be called, and ConfigurationError where the broker's workers would not see this app's jobs.
        """
        if self._check_callbacks and job.callback is not None:
            check_public(job.callback)
        check_size(job, self._max_job_bytes)
        if job.idempotency_key is None or not isinstance(self.app.backend, RedisBackend):
            # Where the results are not in Redis, the workers hold to the key alone.
            return self._send(job, priority, options)
        queue, backend = options.get("queue", self._queue), self.app.backend
        keys = IdempotencyKeys(backend.client, backend.expires, getattr(queue, "name", queue), results_prefix(self.app))
        claim = keys.claim(job, options.pop("task_id", None) or uuid(), is_sent=False)
        if claim.is_started and self.app.backend.get_task_meta(claim.id, cache=False)["status"] == states.PENDING:
            claim = keys.claim_again(job, claim)
        if claim.is_sent:
            return self.job(claim.id)
        submitted = self._send(job, priority, {**options, "task_id": claim.id})
        keys.confirm(job, claim)
        return submitted

    def _send(self, job: Job, priority: int, options: dict[str, Any]) -> SubmittedJob:
        queue = options.pop("queue", self._queue)
        self._setup.check_sending()
        self._capacity.take(queue)
        try:
            outcome = self.app.send_task(
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
        return SubmittedJob(outcome, getattr(queue, "name", queue))

    def submit_many(
        self, jobs: Iterable[Job], *, priority: int = DEFAULT_PRIORITY, **options: Any
    ) -> list[SubmittedJob]:
        """Queue jobs over one connection, in order. Whatever it raises holds those `submitted` before it."""
        submitted: list[SubmittedJob] = []
        with self.app.producer_pool.acquire(block=True) as producer:
            try:
                for job in jobs:
                    submitted.append(self.submit(job, priority=priority, producer=producer, **options))
            except Exception as error:
                error.submitted = submitted  # type: ignore[attr-defined]
                raise
        return submitted

    def ping(self) -> None:
        """Raises BrokerUnavailable (a ConnectionError) where the broker cannot be reached in seconds.

        `submit` tries for half a minute.
        """
        try:
            with self.app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=5)
        except OperationalError as error:
            raise from_broker(error) from None

    def job(self, id: str) -> SubmittedJob:
        """A job submitted earlier."""
        return SubmittedJob(self.app.AsyncResult(id), self._queue)

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
        asked, backend = list(ids), _with_results(self.app)
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
        backend = self.app.backend
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
        return _each_with_our_errors(iter(FailedJobs(self.app)))

    @_with_our_errors
    def retry(self, id: str, *, queue: str | None = None) -> SubmittedJob:
        """Send a failed job again: it keeps its id, links and chain. Raises NotFound (a LookupError) where it is not
        kept.

        `queue`: where to, for a task of your own that was sent to our queue by mistake.
        """
        jobs = FailedJobs(self.app)
        jobs.retry(jobs.get(id), queue)
        return self.job(id)

    async def asubmit(self, job: Job, **options: Any) -> SubmittedJob:
        """`submit` for asyncio."""
        return await asyncio.to_thread(self.submit, job, **options)

    async def asubmit_many(self, jobs: Iterable[Job], **options: Any) -> list[SubmittedJob]:
        """`submit_many` for asyncio."""
        return await asyncio.to_thread(self.submit_many, list(jobs), **options)

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


class _App(Celery):  # type: ignore[misc]
    """Does not subscribe to each job's result as it sends the job: nobody here would read what Redis then piles up.

    `AsyncResult.get` subscribes itself.
    """

    def _get_backend(self) -> Any:
        backend = super()._get_backend()
        backend.on_task_call = _subscribe_to_nothing
        return backend


def _subscribe_to_nothing(producer: Any, task_id: str) -> None:
    """In place of Celery's `on_task_call`."""


def _app(broker_url: str | None, result_backend: str | None) -> Celery:
    broker_url, of_environment = (
        (broker_url, False) if broker_url else (_environment("BROKER_URL", DEFAULT_BROKER), True)
    )
    backend_url = result_backend or (_environment("RESULT_BACKEND") if of_environment else "")
    broker = _server(broker_url, server)
    results = _server(backend_url or _results_beside(broker_url), result_server)
    # Not the process's current app: that is its own.
    app = _App("idefics_jobs", broker=broker.url, backend=results.url, set_as_current=False)
    # Before CELERY_BROKER_URL and CELERY_RESULT_BACKEND, which a site's own Celery may have in the environment.
    app.backend_cls = results.url
    app.conf.update(
        broker_read_url=broker.url,
        broker_write_url=broker.url,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        broker_transport_options={
            # The worker's steps: with other ones a priority would land in a queue that nobody reads.
            "priority_steps": [int(step) for step in _environment("PRIORITY_STEPS", "0,1,2,3,4,5,6,7,8,9").split(",")],
            **_named(sep=_environment("PRIORITY_SEPARATOR"), global_keyprefix=_environment("BROKER_KEY_PREFIX")),
            "queue_order_strategy": "priority",
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            **broker.keepalive,
            **broker.options,
        },
        result_backend_transport_options={
            **results.options,
            **_named(global_keyprefix=_environment("RESULT_KEY_PREFIX")),
        },
        redis_socket_timeout=SOCKET_TIMEOUT_S,
        redis_socket_connect_timeout=CONNECT_TIMEOUT_S,
        redis_socket_keepalive=bool(results.keepalive),
    )
    return app


def _named(**options: str) -> dict[str, str]:
    """Those that are set: kombu takes an empty one for one too."""
    return {name: value for name, value in options.items() if value}


def _environment(name: str, default: str = "") -> str:
    """One of the worker's settings, where it is in this process's environment too. Empty is the default."""
    return os.environ.get(f"IDEFICS_{name}") or default


def _server(url: str, read: Callable[[str, str, str], Server]) -> Server:
    """Of another broker than Redis, Celery knows what there is to know."""
    if url.partition("://")[0] not in SCHEMES:
        return Server(url)
    return read(url, _environment("SENTINEL_MASTER"), _environment("SENTINEL_PASSWORD"))


def _results_beside(broker_url: str) -> str:
    try:
        return results_beside(broker_url)
    except ValueError as error:
        raise ValueError(f"Give result_backend too: {error}.") from None
