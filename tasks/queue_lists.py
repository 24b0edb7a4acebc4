"""The lists in Redis that make up a queue: one for each priority, under each name that a producer may give it."""

from __future__ import annotations

from celery import Celery

from .redis_keys import GUIDES_SEPARATOR, OUR_STEPS, SEPARATOR, list_name, separator, steps


class QueueLists:
    """The lists of an app's queues, those of producers with other options among them."""

    def __init__(self, app: Celery) -> None:
        self._separators = dict.fromkeys((separator(app), SEPARATOR, GUIDES_SEPARATOR))
        #: The priorities that may have lists, the most urgent first.
        self.priorities = sorted({*OUR_STEPS, *steps(app)})

    def of(self, queue: str) -> dict[str, int]:
        """The names of a queue's lists without the app's prefix, each with its priority; the most urgent first."""
        return {list_name(queue, step, sep): step for step in self.priorities for sep in self._separators}
