"""Dead letters: every job that ended in FAILURE is kept whole, on the list that `tasks/failed.py` reads.

Celery sends its signal `task_failure` in the process where a job fails: usually in the model process; in the parent if
that process was lost or the job overran its hard limit. Both import this module. A message for another app's task,
which cannot run here, is kept by the parent with everything that is needed to send it on.
"""

from __future__ import annotations

import difflib
import logging
import time
from dataclasses import replace
from typing import Any

from celery import Celery, Task, states
from celery.app.task import Context
from celery.canvas import Signature
from celery.signals import task_failure

from tasks.errors import InvalidRequest, from_exception
from tasks.failed import FailedBounds, FailedJob, FailedJobs
from tasks.payloads import PAYLOADS
from tasks.printable import escaped
from tasks.protocol import SUBMITTED_AT
from worker.observability.job_fields import job_extra
from worker.observability.metrics import DEAD_LETTERS
from worker.queue.result_backend import digest_of, is_of_another, submission_of, taken_now

logger = logging.getLogger(__name__)

#: Characters up to which an invalid request's payload is kept: writing a megabyte costs as much as ten jobs.
MAX_INVALID_CHARS = 200_000
#: Characters of an unknown task's name in the error that its sender reads.
MAX_SHOWN_CHARS = 80


def keep_failures(app: Celery, bounds: FailedBounds) -> None:
    """From now on keep the failed jobs of an app's tasks."""

    def keep(sender: Task, task_id: str, exception: BaseException, args: Any, kwargs: Any, **_: Any) -> None:
        if sender.app is not app:
            return
        try:
            if not _ended_otherwise(app, sender.name, task_id, args, kwargs):
                request = _request(sender, task_id, args, kwargs)
                job = failed_job(sender.name, request, exception)
                FailedJobs(app).keep(job, dict(sender.signature_from_request(request, retries=0)), bounds)
                DEAD_LETTERS.inc()
        except Exception as error:
            about = job_extra(task_id, sender.name, from_exception(exception).code)
            logger.error("Job %s failed and cannot be kept on the list of failed jobs: %s", task_id, error, extra=about)

    task_failure.connect(keep, weak=False)


def failed_job(task: str, request: Context, error: BaseException) -> FailedJob:
    ours = from_exception(error)
    return FailedJob(
        id=request.id,
        task=task,
        code=ours.code,
        message=str(ours),
        detail=ours.detail,
        host=str(request.hostname),
        attempts=(request.retries or 0) + 1,
        submitted_at=request.get(SUBMITTED_AT),
        failed_at=time.time(),
        is_whole=ours.code != InvalidRequest.code or not _is_longer((request.args, request.kwargs), MAX_INVALID_CHARS),
    )


def unknown_task(name: str) -> str:
    """The error for the sender of a message for an unknown task, with the likely correction."""
    likely = difflib.get_close_matches(name, PAYLOADS, 1)
    if likely:
        cure = f"did you mean {likely[0]}?"
    else:
        cure = f"use one of {', '.join(PAYLOADS)}, or send it to its own worker's queue."
    return (
        f"This queue's workers have no task {escaped(name[:MAX_SHOWN_CHARS])}: {cure} "
        "`idefics-jobs failed retry ID --queue NAME` sends the message on."
    )


def misrouted(message: Any, host: str) -> Context:
    """The request in a checked message for an unknown task."""
    args, kwargs, links = message.payload
    own = {"args": args, "kwargs": kwargs, "properties": message.properties, "hostname": host}
    request = Context({**message.headers, **links, **own, "delivery_info": taken_now(message)})
    request.submission = submission_of(request, begins=True)
    return request


def keep_misrouted(app: Celery, request: Context, bounds: FailedBounds, error: InvalidRequest) -> None:
    """Keep a message for an unknown task, so that it can be sent on to its own queue."""
    job = replace(failed_job(request.task, request, error), is_whole=True)
    options = {**request.as_execution_options(), "ignore_result": bool(request.ignore_result)}
    priority = (request.properties or {}).get("priority")
    signature = Signature(request.task, request.args, request.kwargs, {**options, "priority": priority}, app=app)
    try:
        FailedJobs(app).keep(job, dict(signature), bounds)
        DEAD_LETTERS.inc()
    except ValueError as too_large:
        about = job_extra(request.id, request.task, error.code)
        logger.error("Message %s cannot be kept on the list of failed jobs: %s", request.id, too_large, extra=about)


def _is_longer(value: Any, most: int) -> bool:
    """Whether a JSON value has more than `most` characters and entries. Stops reading at the first excess."""
    rest = [value]
    while rest and most >= 0:
        each = rest.pop()
        most -= len(each) if isinstance(each, str | list | tuple | dict) else 1
        if isinstance(each, list | tuple | dict):
            rest += [*each.items()] if isinstance(each, dict) else each
    return most < 0


def _ended_otherwise(app: Celery, task: str, id: str, args: Any, kwargs: Any) -> bool:
    """Whether another run of the same job ended first, with a result or canceled."""
    record = app.backend.get_task_meta(id, cache=False)
    is_other = record["status"] in states.READY_STATES - {states.FAILURE}
    return is_other and not is_of_another(record, digest_of(task, args, kwargs))


def _request(task: Task, id: str, args: Any, kwargs: Any) -> Context:
    """The failed job's request. For a rejection in the parent one is made from the payload, without links."""
    request = task.request
    return request if request.id == id else Context(id=id, args=args, kwargs=kwargs)
