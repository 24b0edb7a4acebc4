"""Idempotency keys, on the worker's side: the second job with a key gets the first one's answer.

Our own client does not send a second job. Other producers do, under a new id: such a job comes here.
"""

from __future__ import annotations

import time
from typing import Any

from celery import states

from tasks.errors import from_exception
from tasks.idempotency import IdempotencyKeys
from tasks.payloads import Job
from tasks.results import ModelInfo, Result
from worker.jobs.runs import CancellationError

#: Bounds in seconds of the countdown until the second job checks again; it grows with the first job's age.
MIN_COUNTDOWN_S, MAX_COUNTDOWN_S = 1.0, 30.0


class FirstStillRuns(Exception):
    """The first job with this key has not ended: the second is to check again after `countdown` seconds."""

    def __init__(self, countdown: float) -> None:
        super().__init__(countdown)
        self.countdown = countdown


def first_answer(
    job: Job, id: str, keys: IdempotencyKeys, backend: Any, model: ModelInfo | None = None
) -> Result | None:
    """The answer of the first job with this key; None where this job is the first, or takes its place, and is to run.

    It takes the first one's place where that was lost, or answered by another model than `model`. Raises InvalidRequest
    where the first one had another payload, FirstStillRuns, or the error that the first one ended with.
    """
    claim = keys.claim(job, id, is_sent=True)
    if claim.id == id:
        keys.start(job, claim)
        return None
    meta = backend.get_task_meta(claim.id, cache=False)
    if meta["status"] == states.SUCCESS:
        answer = Result.model_validate(meta["result"])
        if model is None or _is_same(answer.model, model):
            return answer.model_copy(update={"metadata": job.metadata})
    if meta["status"] == states.FAILURE:
        raise from_exception(meta["result"])
    if meta["status"] == states.REVOKED:
        raise CancellationError
    now = time.time()
    is_gone = meta["status"] == states.PENDING and claim.is_abandoned(now)
    if (is_gone or meta["status"] == states.SUCCESS) and keys.take_over(job, claim, id):
        return None
    raise FirstStillRuns(min(max(MIN_COUNTDOWN_S, (now - claim.claimed_at) / 4), MAX_COUNTDOWN_S))


def _is_same(one: ModelInfo, other: ModelInfo) -> bool:
    return (one.id, one.revision) == (other.id, other.revision)
