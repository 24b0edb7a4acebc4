"""Jobs with an idempotency key, on the worker's side: the second one gets the first one's answer.

Our client does not even send a second job. Other producers do, under an id of its own: it comes here.
"""

from __future__ import annotations

import time
from typing import Any

from celery import states

from tasks.errors import from_exception
from tasks.idempotency import IdempotencyKeys
from tasks.payloads import Job, ModelInfo, Result
from worker.jobs.runs import Canceled

#: Seconds between two looks for the first job's end, which grow with its age.
FIRST_LOOK_S, LAST_LOOK_S = 1.0, 30.0


class FirstStillRuns(Exception):
    """The first job with this key has not ended: look again after so many seconds."""

    def __init__(self, countdown: float) -> None:
        super().__init__(countdown)
        self.countdown = countdown


def first_answer(
    job: Job, id: str, keys: IdempotencyKeys, backend: Any, model: ModelInfo | None = None
) -> Result | None:
    """What the first job with this key was answered; None for the first itself, which is to run.

    An answer of another model than `model` is none: the job runs, and the key is its own from then on. Raises
    InvalidRequest where that had another payload, FirstStillRuns, or what the first one ended with.
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
        raise Canceled
    now = time.time()
    is_gone = meta["status"] == states.PENDING and claim.is_abandoned(now)
    if (is_gone or meta["status"] == states.SUCCESS) and keys.take_over(job, claim, id):
        return None
    raise FirstStillRuns(min(max(FIRST_LOOK_S, (now - claim.claimed_at) / 4), LAST_LOOK_S))


def _is_same(one: ModelInfo, other: ModelInfo) -> bool:
    return (one.id, one.revision) == (other.id, other.revision)
