"""Puts doubtful answers on the review list, with small copies of their pictures.

It is never in a job's way: what fails here is logged, and the job's result stays as it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from tasks.payloads import Job
from tasks.results import Choice, Result
from tasks.review import RankedAnswer, ReviewBounds, ReviewItem, ReviewList
from tasks.review.decision_callback import EVENT
from worker.images.copies import PictureCopies
from worker.jobs.asked import asked
from worker.jobs.runs import JobContext
from worker.runtime import gil

logger = logging.getLogger(__name__)

#: Pictures of an item.
MAX_PICTURES = 4
#: Connections to Redis, beside those of the results.
CONNECTIONS = 2


class Reviews:
    """The review list, as jobs see it. Used from many threads at once."""

    def __init__(self, reviews: ReviewList, bounds: ReviewBounds) -> None:
        """`reviews`: with a client that does not wait while Redis is away."""
        self._reviews = reviews
        self._bounds = bounds
        self._connections = threading.Semaphore(CONNECTIONS)

    def add(self, job: Job, context: JobContext, result: Result, copies: PictureCopies | None) -> None:
        """Put an abstained job's answer on the list. Logs what goes wrong."""
        try:
            pictures = copies.jpegs() if copies else []
            item = review_item(job, context, result, len(pictures))
            with gil.released(), self._connections:
                self._reviews.put(
                    item, pictures, self._bounds, callback=_callback(job), submitted_at=context.submitted_at
                )
        except Exception as error:
            logger.error("The doubtful answer of job %s is not on the review list: %s", context.id, error)


def picture_copies(job: Job, pictures: int, copy: Callable[[bytes], bytes]) -> PictureCopies:
    """Copies to be made of a job's pictures. `pictures`: how many its prompt has; those of its examples come first."""
    most = 1 if "image" in type(job).model_fields else MAX_PICTURES
    return PictureCopies(range(max(0, pictures - most), pictures), copy)


def review_item(job: Job, context: JobContext, result: Result, pictures: int) -> ReviewItem:
    """The item of an abstained job. `pictures`: the number of copies."""
    assert result.confidence is not None
    assert job.min_confidence is not None
    return ReviewItem(
        id=context.id,
        task=job.task,
        asked=asked(job),
        answers=ranked(result),
        confidence=result.confidence,
        min_confidence=job.min_confidence,
        pictures=pictures,
        created=time.time(),
        metadata=result.metadata,
        answer=result.text,
        raw_confidence=result.raw_confidence,
        model=result.model.id,
        revision=result.model.revision,
    )


def ranked(result: Result) -> tuple[RankedAnswer, ...]:
    """A result's different answers, the likeliest first: its labels, or its choices' texts."""
    if result.scores:
        found = list(result.scores.items())
    else:
        answers: Sequence[Choice | Result] = result.choices or [result]
        found = [(each.text, each.confidence or 0.0) for each in answers]
    best: dict[str, float] = {}
    for text, confidence in found:
        best[text] = max(confidence, best.get(text, 0.0))
    return tuple(RankedAnswer(text, best[text]) for text in sorted(best, key=lambda text: -best[text]))


def _callback(job: Job) -> tuple[str, str] | None:
    callback = job.callback
    if callback is None or (callback.events and EVENT not in callback.events):
        return None
    return callback.url, callback.key_id
