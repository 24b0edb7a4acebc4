"""Deduplication by idempotency keys, in the worker: the second job with a key gets the first one's answer.

Our own client does not send a second job with a key. Other producers do, under a new id.
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
    """The first job with this key has not ended: the second one must check again after `countdown` seconds."""

    def __init__(self, countdown: float) -> None:
        super().__init__(countdown)
        self.countdown = countdown


def first_answer(
    job: Job, id: str, keys: IdempotencyKeys, backend: Any, model: ModelInfo | None = None
) -> Result | None:
    """The answer of the first job with this key; None if this job must run, as the first one or in its place.

    It takes the first one's place if that was lost, or was answered by another model than `model`. Raises
    InvalidRequest if the first one had another payload, FirstStillRuns, or the error that the first one ended with.
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
