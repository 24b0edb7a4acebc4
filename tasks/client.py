"""The producers' client: typed payloads in, typed results out, over any Celery app or a broker URL."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from typing import Unpack

from .blocking_client import BlockingClient
from .failed import FailedJob
from .outcomes import Outcome
from .payloads import Job
from .protocol import DEFAULT_PRIORITY
from .results import Result
from .submission import SubmitOptions
from .submitted_job import Status, SubmittedJob
from .worker_registry import ServedModel

__all__ = ["Client", "Status", "SubmitOptions", "SubmittedJob"]


class Client(BlockingClient):
    """Submits jobs to the workers of a broker: BlockingClient's calls, and the same for asyncio.

    Give it the broker's URL, or a Celery app: it uses the app's settings with separate connections. Safe to share
    between threads.
    """

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

    async def aqueued(self, priority: int | None = None, *, model: str | None = None) -> int:
        """`queued` for asyncio."""
        return await asyncio.to_thread(functools.partial(self.queued, priority, model=model))

    async def aworkers(self, *, model: str | None = None) -> list[str]:
        """`workers` for asyncio."""
        return await asyncio.to_thread(functools.partial(self.workers, model=model))

    async def amodels(self) -> list[ServedModel]:
        """`models` for asyncio."""
        return await asyncio.to_thread(self.models)

    async def aping(self) -> None:
        """`ping` for asyncio."""
        await asyncio.to_thread(self.ping)

    async def afailed(self) -> list[FailedJob]:
        """`failed` for asyncio."""
        return await asyncio.to_thread(lambda: list(self.failed()))

    async def aretry(self, id: str, *, queue: str | None = None) -> SubmittedJob:
        """`retry` for asyncio."""
        return await asyncio.to_thread(functools.partial(self.retry, id, queue=queue))
