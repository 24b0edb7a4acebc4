"""What a watcher learns of a job: its stage, its text as it grows, and its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .errors import JobCanceled
from .outcomes import Outcome
from .results import Result

Stage = Literal["queued", "loading_images", "running"]


@dataclass(frozen=True, slots=True)
class StageUpdate:
    """The job has reached a stage, or more of those before it have left the queue."""

    kind: ClassVar[Literal["stage"]] = "stage"
    stage: Stage
    #: Jobs before it in its queue, at most: exact among the next ones of the queue, if this user may read it. None: not
    #: known, or the job is not in the queue.
    ahead: int | None = None

    def data(self) -> dict[str, Any]:
        """The update as JSON, without its kind."""
        return {"stage": self.stage, **({} if self.ahead is None else {"ahead": self.ahead})}


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """The next piece of the text. The pieces join to the result's text."""

    kind: ClassVar[Literal["text"]] = "text"
    text: str

    def data(self) -> dict[str, Any]:
        """The update as JSON, without its kind."""
        return {"text": self.text}


@dataclass(frozen=True, slots=True)
class RestartedUpdate:
    """The job runs again, as after a worker's death: drop the text so far, it comes anew."""

    kind: ClassVar[Literal["restarted"]] = "restarted"

    def data(self) -> dict[str, Any]:
        """The update as JSON, without its kind."""
        return {}


@dataclass(frozen=True, slots=True)
class EndUpdate:
    """The job has ended. The last update."""

    kind: ClassVar[Literal["end"]] = "end"
    outcome: Outcome

    @property
    def status(self) -> Literal["succeeded", "failed", "canceled"]:
        """As SubmittedJob.status says it."""
        if isinstance(self.outcome, Result):
            return "succeeded"
        return "canceled" if isinstance(self.outcome, JobCanceled) else "failed"

    def result(self) -> Result:
        """The answer. Raises the job's JobError, or JobCanceled."""
        if isinstance(self.outcome, Result):
            return self.outcome
        raise self.outcome

    def data(self) -> dict[str, Any]:
        """The update as JSON, without its kind: the status, and the result or what visitors may see of the error."""
        if isinstance(self.outcome, Result):
            return {"status": self.status, "result": self.outcome.model_dump(mode="json")}
        return {"status": self.status, **self.outcome.response()[1]}


Update = StageUpdate | TextUpdate | RestartedUpdate | EndUpdate


def server_sent_event(update: Update) -> str:
    """An update as an event of a `text/event-stream`, named by its kind. Its data is one line of ASCII."""
    return f"event: {update.kind}\ndata: {json.dumps(update.data())}\n\n"


def text_of(outcome: Outcome) -> str | None:
    """The text that was written for an outcome, also of a canceled job; None for a label, and for a failed job."""
    result = outcome.partial if isinstance(outcome, JobCanceled) else outcome
    return result.text if isinstance(result, Result) and result.label is None else None
