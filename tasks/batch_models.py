"""Chooses the model, and so the queue, for each line of a batch file.

A line that names a model, by its name or its id, goes to that model's queue. If no worker serves the model, the line's
form decides:

- A line in our own form is refused.
- A line in OpenAI's form must name a model, and may have been written for another service. If all workers take from the
  client's own queue, it goes there, since there is only one model. If workers serve several models, it is refused,
  since nothing tells which one is meant.

A client that was created with a queue or a model sends all lines there and ignores the models that they name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .batch_lines import Line
from .bulk import JobSender
from .errors import ModelNotFound
from .payloads import Job

#: Maximum unserved models that are remembered, so that each is looked up and reported once.
MAX_REMEMBERED = 100


class LineModels:
    """Submits the jobs of a batch's lines to their models' queues."""

    def __init__(self, client: Any, note: Callable[[str], None]) -> None:
        """`note` is called with a message for each model whose lines another model answers."""
        self._client = client
        self._note = note
        #: Models of lines that go to the client's own queue.
        self._ignored: set[str] = set()

    def of(self, line: Line) -> Line:
        """The line, without its model if the client sends all lines to one queue."""
        # A client of the caller's own without `is_bound` does not know models.
        return replace(line, model=None) if getattr(self._client, "is_bound", True) else line

    def submit(self, sender: JobSender, line: Line, job: Job, **options: Any) -> None:
        """Submit a line's job to `sender`, the client's. Raises the errors of the client's `submit`, such as
        ModelNotFound for a line that is refused."""
        if line.model is None or line.model in self._ignored:
            sender.submit(job, **options)
            return
        try:
            sender.submit(job, model=line.model, **options)
        except ModelNotFound as unknown:
            if not (line.is_openai and self._has_one_model(unknown)):
                raise
            sender.submit(job, **options)
            self._ignore(line.model)

    def queued(self, models: set[str | None], priority: int) -> int:
        """The number of jobs with this priority that wait in the queues of lines with these models."""
        return sum(self._queued(model, priority) for model in models)

    def _queued(self, model: str | None, priority: int) -> int:
        if model is not None and model not in self._ignored:
            # A model that is not found was ignored in an earlier run of the batch, which sent its lines to the own
            # queue.
            with contextlib.suppress(ModelNotFound):
                return int(self._client.queued(priority, model=model))
        return int(self._client.queued(priority))

    def _has_one_model(self, unknown: ModelNotFound) -> bool:
        return all(model.queue == self._client.queue for model in unknown.served)

    def _ignore(self, model: str) -> None:
        if len(self._ignored) < MAX_REMEMBERED:
            self._ignored.add(model)
            self._note(
                f"No worker serves the model {model[:200]!r}: its lines are answered by the model of the queue "
                f"{self._client.queue!r}."
            )
