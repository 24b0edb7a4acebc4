"""Bulk jobs: lines in, answers out, with a bounded number of jobs in flight.

```python
with open("in.jsonl", "rb") as lines:
    for answer in batch.run(client, lines):
        ...
```

`idefics-jobs batch` is the same for files, and resumes an interrupted batch (`tasks/cli/batch.py`).
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .batch_input import json_lines
from .batch_lines import Fingerprints, Line, answer, read_line
from .batch_models import LineModels
from .bulk import JobSender
from .errors import ModelNotFound
from .job_window import PRIORITY, WINDOW, JobsLost, JobWindow
from .outcomes import Outcome
from .payloads import Job

__all__ = ["PRIORITY", "WINDOW", "Batch", "JobsLost", "run"]


def run(
    client: Any, lines: Iterable[str | bytes], *, window: int = WINDOW, priority: int = PRIORITY
) -> Iterator[dict[str, Any]]:
    """The answers to lines in our form or OpenAI's batch form (see batch_lines), in the order in which jobs end.

    An answer's result is deleted from Redis when the next answer is requested. Raises NotJsonLines, before anything is
    sent, for input that is clearly not lines of JSON.
    """
    for answers in Batch(client, lines, window=window, priority=priority).turns():
        yield from answers


class Batch(JobWindow[Line, dict[str, Any]]):
    """One pass over the lines. Waits while Redis is away or the broker is full."""

    def __init__(
        self,
        client: Any,
        lines: Iterable[str | bytes],
        *,
        window: int = WINDOW,
        priority: int = PRIORITY,
        name: str | None = None,
        done: Fingerprints | None = None,
        sent: int = 0,
        on_sent: Callable[[int], None] = lambda number: None,
        on_note: Callable[[str], None] = lambda text: None,
        keep_results: bool = False,
    ) -> None:
        """`name` identifies this batch's jobs, so that a later run finds their results.

        Lines in `done` are left out. Those up to number `sent` have their jobs in the queue or ended already;
        `on_sent` is told how far this is; `on_note` what the user should know, a sentence.
        """
        done = Fingerprints() if done is None else done
        models = LineModels(client, on_note)
        self._lines = _Lines(lines, models, name or uuid.uuid4().hex, done, sent, on_sent)
        super().__init__(client, self._lines, window=window, priority=priority, keep_results=keep_results)

    @property
    def read(self) -> int:
        """Number of lines read."""
        return self._lines.read


class _Lines:
    """A batch's lines as the work of a JobWindow."""

    def __init__(
        self,
        lines: Iterable[str | bytes],
        models: LineModels,
        name: str,
        done: Fingerprints,
        sent: int,
        on_sent: Callable[[int], None],
    ) -> None:
        self._lines = lines
        self._models = models
        self._name = name
        self._done = done
        self._sent = sent
        self._on_sent = on_sent
        self._seen = Fingerprints()
        self.read = 0

    def items(self) -> Iterator[Line | None]:
        for number, text in enumerate(json_lines(self._lines), 1):
            self.read += 1
            yield self._line(number, text) if text.strip() else None

    def _line(self, number: int, text: str | bytes) -> Line | None:
        line = self._models.of(read_line(number, text))
        if not self._seen.add(line.fingerprint):
            line = line.as_duplicate()
        return None if line.fingerprint in self._done else line

    def job_id(self, line: Line) -> str:
        named = f"{self._name} {line.fingerprint} ".encode() + line.digest
        return str(uuid.UUID(bytes=hashlib.blake2b(named, digest_size=16).digest()))

    def was_sent(self, line: Line) -> bool:
        return line.number <= self._sent

    def submit(self, sender: JobSender, line: Line, job: Job, priority: int, id: str) -> None:
        self._models.submit(sender, line, job, priority=priority, task_id=id)

    def note_sent(self, line: Line) -> None:
        self._on_sent(line.number)

    def answer(self, line: Line, outcome: Outcome | ModelNotFound, id: str) -> dict[str, Any]:
        if isinstance(outcome, ModelNotFound) and line.model is None:
            # The client's own: no line could be sent.
            raise outcome
        return answer(line, outcome, id)

    def queued(self, lines: Iterable[Line], priority: int) -> int:
        return self._models.queued({line.model for line in lines}, priority)
