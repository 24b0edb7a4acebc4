"""Which model a batch's lines go to.

A line that names a model, by its name or its id, goes to that model's queue. What becomes of one whose model no worker
serves depends on whose line it is, and on who works:

- A line of ours is refused.
- OpenAI's lines always name a model, and those that were written for another service name one of that service. Where
  all workers take from the client's own queue, they go there: there is one model, and it answers. Where workers serve
  several models they are refused: which of them is meant cannot be known.

A client that was made for a queue or a model has all lines go there, whatever they name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .batch_lines import Line
from .errors import ModelNotFound
from .payloads import Job

#: Names that are remembered, so that one is decided upon once and told once.
MAX_REMEMBERED = 100


class LineModels:
    """Sends the jobs of a batch's lines to their models' queues."""

    def __init__(self, client: Any, note: Callable[[str], None]) -> None:
        """`note` is told of each model whose lines another one answers."""
        self._client = client
        self._note = note
        #: Models of lines that go to the client's own queue.
        self._ignored: set[str] = set()

    def of(self, line: Line) -> Line:
        """A line, without its model where that does not matter."""
        # A client of somebody's own that does not say so knows no models.
        return replace(line, model=None) if getattr(self._client, "is_bound", True) else line

    def submit(self, line: Line, job: Job, **options: Any) -> None:
        """Queue a line's job. Raises what the client's `submit` does: ModelNotFound for a line that is refused."""
        if line.model is None or line.model in self._ignored:
            self._client.submit(job, **options)
            return
        try:
            self._client.submit(job, model=line.model, **options)
        except ModelNotFound as unknown:
            if not (line.is_openai and self._has_one_model(unknown)):
                raise
            self._client.submit(job, **options)
            self._ignore(line.model)

    def queued(self, models: set[str | None], priority: int) -> int:
        """Jobs with that priority that wait where lines with these models were sent to."""
        return sum(self._queued(model, priority) for model in models)

    def _queued(self, model: str | None, priority: int) -> int:
        if model is not None and model not in self._ignored:
            # One that is not found was ignored by an earlier run.
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
