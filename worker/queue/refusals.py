"""Refused messages: one with an id ends as `invalid_request` under it, others become dead letters.

`worker/queue/envelope` checks messages; `worker/queue/consumer.py` calls it.
"""

from __future__ import annotations

import hashlib
import logging
import time

from celery import Celery
from celery.utils.objects import Bunch

from tasks.errors import InvalidRequest, JobError
from tasks.failed import FailedBounds, FailedJob, FailedJobs
from worker.observability.job_fields import job_extra
from worker.observability.metrics import DEAD_LETTERS, JOBS, UNKNOWN_TASK
from worker.queue.envelope import MessageRefused, described
from worker.queue.result_backend import Submission

logger = logging.getLogger(__name__)

#: Bytes of such a message that are kept.
KEPT_BYTES = 2_000


class Refusals:
    """Called with each message before it is dropped. Its links, chain and chord are not called: they may be the reason
    for the refusal."""

    def __init__(self, app: Celery, bounds: FailedBounds) -> None:
        self._app = app
        self._bounds = bounds

    def __call__(self, raw: bytes, refused: MessageRefused, taken: str = "") -> Submission | None:
        """Store the refusal. Returns what it was stored for, if the message has an id. Raises Redis's errors."""
        what = described(raw, refused)
        JOBS.labels(UNKNOWN_TASK, "failed", InvalidRequest.code).inc()
        if not refused.id:
            # Its sender cannot read of it anywhere.
            logger.warning("%s is dropped. %s", what, refused)
            self._keep(raw, refused)
            return None
        job = job_extra(refused.id, code=InvalidRequest.code)
        logger.info("%s is dropped. %s", what, refused, extra=job)
        # No submission has this digest, so a correct message under the same id still runs. The reason is hashed too,
        # since it may be in the headers, which `raw` does not include.
        digest = hashlib.blake2b(raw + str(refused).encode(), digest_size=16).hexdigest()
        submission = Submission(f"refused{digest}", begins=True, taken=taken)
        self.end(refused.id, InvalidRequest(str(refused)), submission)
        return submission

    def end(self, id: str, error: JobError, submission: Submission | None = None) -> None:
        """Store a job's failure without its links, chain and chord."""
        request = Bunch(
            chord=None, errbacks=None, chain=None, task=None, delivery_info={}, id=id, submission=submission
        )
        self._app.backend.mark_as_failure(id, error, request=request)

    def _keep(self, raw: bytes, refused: MessageRefused) -> None:
        job = FailedJob(
            # The same message has one entry, even if it is delivered several times.
            id=f"refused-{hashlib.sha256(raw).hexdigest()[:16]}",
            task="unknown",
            code=InvalidRequest.code,
            # Escaped: it is read in a terminal.
            message=f"{refused} It was: {raw[:KEPT_BYTES]!r}",
            host="",
            attempts=0,
            submitted_at=None,
            failed_at=time.time(),
            is_whole=False,
        )
        FailedJobs(self._app).keep(job, {}, self._bounds)
        DEAD_LETTERS.inc()
