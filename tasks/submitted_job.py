"""A submitted job: its status, its result, its cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from celery import Celery, states
from celery.backends.redis import RedisBackend
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from pydantic import BaseModel
from redis.exceptions import RedisError

from .broker_errors import with_our_errors
from .job_watch import JobWatch
from .outcomes import Outcome
from .protocol import CANCEL_TTL_S, QUEUE
from .redis_keys import CANCELLATION, results_prefix
from .result_wait import ResultWait
from .results import Result
from .setup_check import setup_check_of
from .stored_results import readable_backend
from .updates import EndUpdate, Update

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


class SubmittedJob:
    """A job on its way. Keep its `id`: `Client.job(id)` finds it again from any process."""

    def __init__(
        self,
        outcome: AsyncResult[Any],
        queue: str | None = QUEUE,
        app: Celery | None = None,
        response_model: type[BaseModel] | None = None,
        priority: int = 9,
    ) -> None:
        """`queue`: where it waits, if that is known. `app`: the one to ask by, where it is not the handle's own.
        `response_model`: what its result is parsed as. `priority`: its own, or the last one if that is not known."""
        #: Celery's own handle, for all that Celery can do.
        self.async_result = outcome
        self.id: str = outcome.id
        self._queue = queue
        self._response_model = response_model
        self._priority = priority
        self._app: Celery = app or outcome.app

    def __repr__(self) -> str:
        return f"SubmittedJob({self.id!r})"

    @property
    @with_our_errors
    def status(self) -> Status:
        """`starting` (it waits), `processing` (it runs or is retried), `succeeded`, `failed` or `canceled`.

        `starting` is also the status of an unknown id, which Celery cannot distinguish from a waiting job, and of a
        canceled job that no worker has taken from the queue yet.

        Raises ConfigurationError if the app's result backend is not the workers'.
        """
        state = readable_backend(self._app).get_task_meta(self.id)["status"]
        if state == states.PENDING:
            setup_check_of(self._app).check_reading()
        return _STATUS.get(state, "processing")

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answer, at most `timeout` seconds. A wait continues through a restart of Redis.

        Raises the job's JobError, JobCanceled, or JobTimeout (a TimeoutError), after which the job goes on;
        BrokerUnavailable if Redis is away at the timeout, or for a minute; ConfigurationError if the app's options are
        not the workers', so that no answer can come.
        """
        wait = ResultWait(self._app, self.id, self._queue, timeout)
        while (outcome := wait.poll()) is None:
            time.sleep(wait.pause_s())
        return _answer(outcome).parsed_as(self._response_model)

    async def aresult(self, timeout: float | None = None) -> Result:
        """`result` for asyncio, without blocking a thread."""
        wait = ResultWait(self._app, self.id, self._queue, timeout)
        while (outcome := await asyncio.to_thread(wait.poll)) is None:
            await asyncio.sleep(wait.pause_s())
        return _answer(outcome).parsed_as(self._response_model)

    def watch(self, timeout: float | None = None) -> Iterator[Update]:
        """The job's updates to its end, all of them also for one who comes late: StageUpdate, TextUpdate where the job
        has `stream`, RestartedUpdate, and EndUpdate.

        Raises JobTimeout after `timeout` seconds, and as `result` does where no answer can come; a job's own error is
        in its EndUpdate. A watch continues through a restart of Redis.
        """
        watch = JobWatch(self._app, self.id, self._queue, timeout, self._priority)
        while True:
            yield from map(self._with_parsed, watch.poll())
            if watch.has_ended:
                return
            time.sleep(watch.pause_s())

    async def awatch(self, timeout: float | None = None) -> AsyncIterator[Update]:
        """`watch` for asyncio, without blocking a thread."""
        watch = JobWatch(self._app, self.id, self._queue, timeout, self._priority)
        while True:
            for update in await asyncio.to_thread(watch.poll):
                yield self._with_parsed(update)
            if watch.has_ended:
                return
            await asyncio.sleep(watch.pause_s())

    def _with_parsed(self, update: Update) -> Update:
        if isinstance(update, EndUpdate) and isinstance(update.outcome, Result):
            return EndUpdate(update.outcome.parsed_as(self._response_model))
        return update

    async def astatus(self) -> Status:
        """`status` for asyncio."""
        return await asyncio.to_thread(lambda: self.status)

    async def acancel(self) -> None:
        """`cancel` for asyncio."""
        await asyncio.to_thread(self.cancel)

    @with_our_errors
    def cancel(self) -> None:
        """Cancel the job: it does not start, or ends at its next step, and JobCanceled has its text so far."""
        # The key also reaches workers that start later, without rights to Celery's mailbox; the mailbox is faster.
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


def _answer(outcome: Outcome) -> Result:
    if isinstance(outcome, Result):
        return outcome
    raise outcome
