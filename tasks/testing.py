"""A client for your tests: no broker, no worker, the answers that you give it."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Unpack

from .bulk import OneByOne, OnSent, ignore_sent
from .errors import InvalidRequest, JobCanceled, JobError, JobTimeout, ModelNotFound, NotFound
from .failed import FailedJob
from .idempotency import digest
from .outcomes import Outcome
from .payloads import Classify, Job
from .protocol import DEFAULT_PRIORITY, QUEUE
from .results import ModelInfo, Result, Timing, Usage
from .submission import SubmitOptions
from .submitted_job import Status
from .updates import EndUpdate, StageUpdate, TextUpdate, Update, text_of
from .worker_registry import NAMED, ServedModel

Answer = Callable[[Job], Result | str]


class FakeJob:
    """What FakeClient.submit returns: a SubmittedJob that has ended. One without an outcome waits for ever."""

    def __init__(self, outcome: Outcome | None, id: str | None = None, *, is_streamed: bool = False) -> None:
        self.id = id or str(uuid.uuid4())
        self.outcome = outcome
        self._is_streamed = is_streamed

    @property
    def status(self) -> Status:
        if isinstance(self.outcome, Result):
            return "succeeded"
        if self.outcome is None:
            return "starting"
        return "canceled" if isinstance(self.outcome, JobCanceled) else "failed"

    def result(self, timeout: float | None = None) -> Result:
        if isinstance(self.outcome, Result):
            return self.outcome
        raise self.outcome or JobTimeout(f"Job {self.id} has no answer: it was not submitted, or was forgotten.")

    def watch(self, timeout: float | None = None) -> Iterator[Update]:
        """That it runs, the text word by word where the job has `stream`, and the end."""
        if self.outcome is None:
            yield StageUpdate("queued")
            self.result()
            return
        yield StageUpdate("running")
        text = text_of(self.outcome) if self._is_streamed else None
        words = (text or "").split(" ")
        yield from (TextUpdate(piece) for piece in (words[0], *(f" {word}" for word in words[1:])) if piece)
        yield EndUpdate(self.outcome)

    async def awatch(self, timeout: float | None = None) -> AsyncIterator[Update]:
        for update in self.watch():
            yield update

    async def aresult(self, timeout: float | None = None) -> Result:
        return self.result()

    async def astatus(self) -> Status:
        return self.status

    def cancel(self) -> None:
        """Do nothing: the job has ended."""

    async def acancel(self) -> None:
        self.cancel()


class FakeClient:
    """Answers every job with `answer(job)`: a text or a whole Result. A JobError that it raises fails the job, and
    JobCanceled cancels it."""

    def __init__(self, answer: Answer = lambda job: "an answer", *, models: Iterable[str] = ()) -> None:
        """`models`: the names that `submit(job, model=...)` may give. Their answers have that name as `model.id`."""
        self._answer = answer
        self._served = [ServedModel("fake", QUEUE), *(ServedModel(name, f"{NAMED}{name}") for name in models)]
        self._jobs: dict[str, FakeJob] = {}
        #: By model and idempotency key.
        self._keyed: dict[tuple[str, str], tuple[str, FakeJob]] = {}
        self._failed: dict[str, tuple[FailedJob, Job, str]] = {}
        #: The payloads in the order of submission.
        self.submitted: list[Job] = []

    is_bound = False

    @property
    def queue(self) -> str:
        return QUEUE

    def submit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> FakeJob:
        model = self._model(options.get("model"))
        key = (model, job.idempotency_key or "")
        if key in self._keyed:
            known, submitted = self._keyed[key]
            if known != digest(job):
                raise InvalidRequest("idempotency_key: another payload has this key.")
            return submitted
        self.submitted.append(job)
        submitted = self._run(job, options.get("task_id") or str(uuid.uuid4()), model)
        if job.idempotency_key:
            self._keyed[key] = digest(job), submitted
        return submitted

    def _model(self, name: str | None) -> str:
        """The id of the model with this name; by default that of the queue `idefics`. Raises ModelNotFound."""
        served = [model.id for model in self._served]
        if name is not None and name not in served:
            raise ModelNotFound(name, self._served)
        return name or served[0]

    def _run(self, job: Job, id: str, model: str) -> FakeJob:
        outcome = self._outcome(job, model)
        if isinstance(outcome, JobError):
            self._failed[id] = (_failed(job, id, outcome), job, model)
        self._jobs[id] = FakeJob(outcome, id, is_streamed=job.stream)
        return self._jobs[id]

    def submit_many(
        self, jobs: Iterable[Job], *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]
    ) -> list[FakeJob]:
        return [self.submit(job, priority=priority, **options) for job in jobs]

    @contextlib.contextmanager
    def bulk(self, on_sent: OnSent = ignore_sent) -> Iterator[OneByOne]:
        """Every job is answered at once, as with `submit`."""
        yield OneByOne(self, on_sent)

    def ping(self) -> None:
        """Always there."""

    def job(self, id: str) -> FakeJob:
        """The job with this id. An unknown one waits, as the real client answers: Redis cannot tell them apart."""
        return self._jobs.get(id) or FakeJob(None, id)

    def status(self, id: str) -> Status:
        return self.job(id).status

    def result(self, id: str, timeout: float | None = None) -> Result:
        return self.job(id).result()

    def cancel(self, id: str) -> None:
        self.job(id).cancel()

    def outcomes(self, ids: Iterable[str]) -> dict[str, Outcome]:
        jobs = {id: self._jobs[id] for id in ids if id in self._jobs}
        return {id: job.outcome for id, job in jobs.items() if job.outcome is not None}

    def forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._jobs.pop(id, None)

    def queued(self, priority: int | None = None, *, model: str | None = None) -> int:
        self._model(model)
        return 0

    def workers(self, *, model: str | None = None) -> list[str]:
        self._model(model)
        return ["fake@localhost"]

    def models(self) -> list[ServedModel]:
        return list(self._served)

    def failed(self) -> Iterator[FailedJob]:
        return (failed for failed, _, _ in tuple(self._failed.values()))

    def retry(self, id: str) -> FakeJob:
        """Asks `answer` once more. Raises NotFound for a job that has not failed."""
        if id not in self._failed:
            raise NotFound(f"No failed job {id}: it was dropped, sent again or is too old.")
        _, job, model = self._failed.pop(id)
        return self._run(job, id, model)

    async def asubmit(self, job: Job, *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]) -> FakeJob:
        return self.submit(job, priority=priority, **options)

    async def asubmit_many(
        self, jobs: Iterable[Job], *, priority: int = DEFAULT_PRIORITY, **options: Unpack[SubmitOptions]
    ) -> list[FakeJob]:
        return self.submit_many(jobs, priority=priority, **options)

    async def aresult(self, id: str, timeout: float | None = None) -> Result:
        return self.result(id)

    async def astatus(self, id: str) -> Status:
        return self.status(id)

    async def acancel(self, id: str) -> None:
        self.cancel(id)

    async def aoutcomes(self, ids: Iterable[str]) -> dict[str, Outcome]:
        return self.outcomes(ids)

    async def aforget(self, ids: Iterable[str]) -> None:
        self.forget(ids)

    async def aqueued(self, priority: int | None = None, *, model: str | None = None) -> int:
        return self.queued(priority, model=model)

    async def aworkers(self, *, model: str | None = None) -> list[str]:
        return self.workers(model=model)

    async def amodels(self) -> list[ServedModel]:
        return self.models()

    async def aping(self) -> None:
        self.ping()

    async def afailed(self) -> list[FailedJob]:
        return list(self.failed())

    async def aretry(self, id: str) -> FakeJob:
        return self.retry(id)

    def _outcome(self, job: Job, model: str) -> Outcome:
        try:
            answer = self._answer(job)
        except (JobError, JobCanceled) as error:
            return error
        result = answer.model_copy() if isinstance(answer, Result) else canned(answer, job, model)
        return result.parsed_as(getattr(job, "response_model", None))


def _failed(job: Job, id: str, error: JobError) -> FailedJob:
    now = time.time()
    return FailedJob(
        id=id,
        task=job.task,
        code=error.code,
        message=str(error),
        detail=error.detail,
        host="fake",
        attempts=1,
        submitted_at=now,
        failed_at=now,
    )


def canned(text: str, job: Job, model: str = "fake") -> Result:
    """A Result with this text and plausible figures. Of a classification the text is a label, else its first one is."""
    labels = job.labels if isinstance(job, Classify) else []
    label = text if not labels or text in labels else labels[0]
    return Result(
        text=label,
        finish_reason="stop",
        label=label if labels else None,
        scores={each: float(each == label) for each in labels} or None,
        confidence=1.0,
        usage=Usage(prompt_tokens=10, completion_tokens=len(text.split()), images=1),
        model=ModelInfo(id=model, family="fake", dtype="float32"),
        timing=Timing(queued_s=0.0, fetch_s=0.0, wait_s=0.0, generate_s=0.0),
        metadata=job.metadata,
    )
