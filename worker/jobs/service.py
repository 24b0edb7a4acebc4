"""One job from its payload to its result, in a thread of the model process.

The thread fetches and decodes its images, hands the engine a row and waits: so downloads overlap with compute.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from config.settings import Settings
from tasks.errors import DeadlineExceeded, Internal, InvalidRequest, JobError, OutOfMemory, PromptTooLong
from tasks.payloads import Chat, Classify, ImagePath, Job, ModelInfo, Result, Timing, Usage, parse
from worker.engine.engine import Pace
from worker.engine.generation import NO_RULES, GenerationRules
from worker.engine.interfaces import Codec, Parts
from worker.engine.row import NotBegun, Output, Picture, Row, Sampling
from worker.images.cache import PictureCache
from worker.images.decode import ImageLimits, open_image
from worker.images.fetch import FetchPolicy
from worker.images.host_limits import HostLimiter, HostLimitReached
from worker.images.sources import SourceReader, is_remote
from worker.jobs.answer_cache import Answers
from worker.jobs.golden import read_golden, tolerance
from worker.jobs.prompts import ImageRef, Prompt, build, ends_with_utterance, in_turns
from worker.models import SetupFailed
from worker.runtime import gil
from worker.runtime.cpu import all_cores

logger = logging.getLogger(__name__)

NO_ANSWER = "The model computes no answer: its weights, their precision or this device is broken."
#: Downloads at once for a job that shows several images. Its own: others' slow hosts must not hold them.
DOWNLOADS = 4
#: Bytes of a picture that takes longer to decode than others should wait for their turn.
LARGE_BYTES = 200_000


class Canceled(Exception):
    """The job's producer took it back while it ran. `partial` is its text so far."""

    def __init__(self, partial: Result | None = None) -> None:
        super().__init__("canceled")
        self.partial = partial


@dataclass(frozen=True, slots=True)
class Ticket:
    """What is known of a job beside its payload."""

    id: str
    priority: int = 5
    #: Unix seconds.
    submitted_at: float | None = None
    #: Seconds from now after which it ends with the text that it has.
    soft_limit_s: float | None = None


class AnyEngine(Protocol):
    """An engine of this process or of another."""

    def submit(self, row: Row) -> Future[Output]: ...

    def cancel(self, row: Row) -> None:
        """End a row at the next step, wherever it is. Its output then says `canceled`."""

    @property
    def pace(self) -> Pace:
        """What runs, and how fast."""

    def withdraw(self, rows: Sequence[Row], most: int) -> list[Row]:
        """Take rows out that have not begun; the caller fails them."""


class Service:
    """Answers jobs on one model. `run` is called from many threads at once."""

    def __init__(
        self,
        settings: Settings,
        info: ModelInfo,
        codec: Codec,
        engine: AnyEngine,
        answers: Answers | None = None,
        rules: GenerationRules = NO_RULES,
    ) -> None:
        """`rules`: the checkpoint's, which each result names as far as they applied to it."""
        self._settings = settings
        self._info = info
        self._codec = codec
        self._engine = engine
        self._answers = answers
        self._rules = rules
        self._rules_told = rules.told()
        self._image_limits = ImageLimits(max_pixels=settings.image_max_pixels)
        self._sources = SourceReader(_fetch_policy(settings))
        #: For the network as for a single host: hosts that hang, however many, leave threads to jobs that need none.
        #: Nor may all threads wait here, before it shows that the hosts hang.
        self._network = HostLimiter(settings.image_job_concurrency, max_waiting=settings.image_job_concurrency // 4)
        self._pictures = PictureCache(self._open, settings.image_cache_bytes)
        #: More decoders than cores only fight over the interpreter.
        self._decoders = threading.Semaphore(len(all_cores()))
        self._running: dict[str, _Run] = {}
        self._canceled: set[str] = set()
        self._lock = threading.Lock()

    @property
    def model(self) -> ModelInfo:
        """The model that answers."""
        return self._info

    def run(self, job: Job, ticket: Ticket) -> Result:
        """A job's answer. Raises a JobError, or Canceled."""
        run = _Run(ticket, _deadline(job, ticket))
        with self._lock:
            self._running[ticket.id] = run
            run.canceled = ticket.id in self._canceled
        try:
            return self._answer(job, run)
        except MemoryError:
            # The process may go on: what was to be allocated was not.
            raise OutOfMemory from None
        except (JobError, HostLimitReached):
            if run.canceled:
                # Its failure is no longer of interest, and must not have it tried again.
                raise Canceled from None
            raise
        finally:
            with self._lock:
                # Another job may have begun under the id since this one passed its limit.
                if self._running.get(ticket.id) is run:
                    del self._running[ticket.id]

    def cancel(self, id: str) -> bool:
        """End a job: before it starts, or at its next step. True where no text of it is to be waited for."""
        with self._lock:
            self._canceled.add(id)
        run = self.abandon(id)
        return run is not None and run.row is None

    def abandon(self, id: str) -> _Run | None:
        """End a job's run, if there is one: at its next step. Another run of that job may follow."""
        with self._lock:
            run = self._running.get(id)
            if run is not None:
                run.canceled = True
        if run is not None and run.row is not None:
            self._engine.cancel(run.row)
        return run

    @property
    def pace(self) -> Pace:
        """The engine's, in jobs. Those that load images hold nobody's place in it."""
        pace = self._engine.pace
        return pace._replace(capacity=pace.capacity + self._network.in_use)

    @contextlib.contextmanager
    def withdrawn(self, ids: Sequence[str], most: int) -> Iterator[list[str]]:
        """Those of these jobs, at most so many, that have not begun and shall not here: after the block they end by
        NotBegun."""
        with self._lock:
            runs = [self._running[id] for id in ids if id in self._running]
        by_row = {run.row: run.ticket.id for run in runs if run.row is not None}
        rows = self._engine.withdraw(list(by_row), most)
        try:
            yield [by_row[row] for row in rows]
        finally:
            for row in rows:
                row.fail(NotBegun())

    def is_canceled(self, id: str) -> bool:
        return id in self._canceled

    def forget(self, id: str) -> None:
        """The job has ended: one that comes with its id is another one."""
        self._canceled.discard(id)

    def _answer(self, job: Job, run: _Run) -> Result:
        new_tokens = self._new_tokens(job)
        started = time.monotonic()
        run.check()
        parts = self._load_images(self._prompt(job))
        run.check()
        row = self._row(job, parts, run, new_tokens)
        fetched = time.monotonic()
        with self._lock:
            run.row = row
            row.canceled = run.canceled
        with gil.released():
            output = self._answers.output(row, self._info, self._compute) if self._answers else self._compute(row)
        ended = time.monotonic()
        timing = Timing(
            queued_s=round(run.queued_s, 6),
            fetch_s=round(fetched - started, 6),
            wait_s=round(max(0.0, row.started - fetched), 6),
            generate_s=round(ended - (row.started or ended), 6),
        )
        result = self._result(job, row, output, timing)
        if output.finish_reason == "canceled":
            raise Canceled(result)
        return result

    def _prompt(self, job: Job) -> Prompt:
        return in_turns(job) if self._codec.in_turns else build(job)

    def _compute(self, row: Row) -> Output:
        return self._engine.submit(row).result()

    def _new_tokens(self, job: Job) -> int:
        most = self._settings.max_new_tokens
        if isinstance(job, Chat) and job.max_completion_tokens is not None:
            return min(job.max_completion_tokens, most)
        if job.max_new_tokens is None:
            return min(self._settings.default_new_tokens, most)
        if job.max_new_tokens > most:
            raise InvalidRequest(f"max_new_tokens is {job.max_new_tokens}: this worker's maximum is {most}.")
        return job.max_new_tokens

    def _load_images(self, prompt: Prompt) -> list[str | Picture]:
        references = [part for part in prompt if isinstance(part, ImageRef)]
        if len(references) > self._settings.max_images:
            raise InvalidRequest(
                f"The job shows {len(references)} images: this worker takes at most {self._settings.max_images}."
            )
        if sum(is_remote(reference.source) for reference in references) < 2:
            pictures = [self._load(reference) for reference in references]
        else:
            with gil.released(), self._network.acquire(""):
                pictures = self._download_all(references)
        images = {id(reference): picture for reference, picture in zip(references, pictures, strict=True)}
        return [images[id(part)] if isinstance(part, ImageRef) else part for part in prompt]

    def _load(self, reference: ImageRef) -> Picture:
        if not is_remote(reference.source):
            return self._picture(self._sources.read(reference.source))
        with gil.released(), self._network.acquire(""):
            data = self._sources.read(reference.source)
        return self._picture(data)

    def _download_all(self, references: list[ImageRef]) -> list[Picture]:
        threads = ThreadPoolExecutor(min(DOWNLOADS, len(references)), thread_name_prefix="download")
        try:
            return list(threads.map(self._download, references))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _download(self, reference: ImageRef) -> Picture:
        # Patiently: a job sent away loses what it has loaded.
        data = self._sources.read(reference.source, wait_s=self._settings.image_timeout_s)
        # At once, since the files of all of a job's images take much more memory than what is kept of them.
        with gil.held():
            return self._picture(data)

    def _picture(self, data: bytes) -> Picture:
        # Around all of it: a thread that has the turn may wait for a decoder, or for this very picture.
        with gil.released() if len(data) > LARGE_BYTES else contextlib.nullcontext():
            return self._pictures.get(data)

    def _open(self, data: bytes) -> Picture:
        with self._decoders:
            return self._codec.picture(open_image(data, self._image_limits))

    def _row(self, job: Job, parts: Parts, run: _Run, new_tokens: int) -> Row:
        least = self._codec.least_tokens(parts)
        if least > self._settings.max_prompt_tokens:
            # Splitting 200,000 characters into tokens takes a quarter of a second, of everybody's.
            raise self._too_long(f"at least {least}")
        tokens = self._codec.prepare(parts)
        labels = self._codec.encode_labels(parts[-2:], _spoken_labels(job))
        # The longest label counts too: it stands in the same window.
        length = len(tokens.ids) + max(map(len, labels), default=0)
        if length > self._settings.max_prompt_tokens:
            raise self._too_long(str(length))
        sampling = Sampling(
            max_new_tokens=new_tokens,
            num_beams=job.num_beams,
            temperature=job.temperature,
            **self._cuts(job),
            seed=job.seed,
            stop=tuple(job.stop),
            end_ids=self._codec.end_ids(utterance=ends_with_utterance(job)),
        )
        return Row(tokens, sampling, tuple(labels), run.ticket.priority, run.deadline)

    def _cuts(self, job: Job) -> dict[str, Any]:
        """What leaves unlikely tokens out when a job is sampled: its own fields, else the checkpoint's."""
        asked = {name: value for name in ("top_k", "top_p") if (value := getattr(job, name)) is not None}
        return {**self._rules.sampling, **asked} if job.temperature > 0 else {}

    def _generation(self, job: Job) -> dict[str, Any]:
        """By which of transformers' generation parameters a job was answered; none for plain greedy decoding."""
        if _labels(job):
            return {}
        if job.num_beams > 1:
            return {**self._rules_told.scores, **self._rules_told.beams, "num_beams": job.num_beams}
        sampled = {"temperature": job.temperature, **self._cuts(job)} if job.temperature > 0 else {}
        return {**self._rules_told.scores, **sampled}

    def _too_long(self, count: str) -> PromptTooLong:
        return PromptTooLong(
            f"The prompt has {count} tokens and this worker takes {self._settings.max_prompt_tokens}: "
            "shorten it or raise IDEFICS_MAX_PROMPT_TOKENS."
        )

    def _result(self, job: Job, row: Row, output: Output, timing: Timing) -> Result:
        text = _until_stop(self._codec.decode(output.ids), job.stop)
        scores = dict(zip(_labels(job), output.probabilities, strict=True)) if output.probabilities else None
        label = max(scores, key=scores.__getitem__) if scores else None
        usage = Usage(
            prompt_tokens=len(row.tokens.ids),
            completion_tokens=len(output.ids),
            images=len(row.tokens.pictures),
            cached_images=row.cached_images,
        )
        return Result(
            text=label or text,
            finish_reason=output.finish_reason,
            label=label,
            scores=scores,
            usage=usage,
            model=self._info,
            timing=timing,
            generation=self._generation(job),
            metadata=job.metadata,
        )

    def check_golden(self, folder: Path | None) -> None:
        """Answer the checkpoint's golden picture. Without one, answer a plain prompt at all.

        Raises SetupFailed where the answer is wrong or none: such a model must not serve.
        """
        try:
            self._check_golden(folder)
        except Internal as error:
            raise SetupFailed(f"{NO_ANSWER} {error}") from error
        except JobError as error:
            raise SetupFailed(f"The checkpoint's golden question cannot be asked: {error}") from error
        except SetupFailed:
            raise
        except Exception as error:
            # Of a checkpoint that loads but does not fit together: to start again would not help.
            raise SetupFailed(
                f"The checkpoint cannot be asked ({type(error).__name__}: {error}): correct it."
            ) from error

    def _check_golden(self, folder: Path | None) -> None:
        golden = read_golden(folder) if folder else None
        if golden is None:
            self._check_any_answer()
            return
        pictures = {name: self._open(data) for name, data in golden.pictures.items()}
        # All at once: they share a batch, as jobs do.
        rows = [self._golden_row(question.job, pictures) for question in golden.questions]
        outputs = [self._engine.submit(row) for row in rows]
        found = [
            question.fault(
                self._codec.decode(output.result().ids),
                dict(zip(_labels(question.job), output.result().probabilities, strict=False)),
                tolerance(self._info),
            )
            for question, output in zip(golden.questions, outputs, strict=True)
        ]
        faults = [fault for fault in found if fault]
        if faults:
            raise SetupFailed(
                f"The golden check failed: {faults[0]}; {len(faults)} of {len(found)} answers are wrong. "
                "The weights, their precision or this device is broken."
            )

    def _golden_row(self, job: Job, pictures: Mapping[str, Picture]) -> Row:
        parts: list[str | Picture] = []
        for part in self._prompt(job):
            if isinstance(part, ImageRef):
                assert isinstance(part.source, ImagePath)
                parts.append(pictures[part.source.path])
            else:
                parts.append(part)
        return self._row(job, parts, _Run(Ticket("golden"), None), self._new_tokens(job))

    def _check_any_answer(self) -> None:
        """A checkpoint that we know nothing of says something, and its logits are numbers."""
        parts = ["This is"]
        job = parse("idefics.complete", {"prompt": parts, "max_new_tokens": 4})
        said = self._engine.submit(self._row(job, parts, _Run(Ticket("golden"), None), 4)).result()
        scored = Row(self._codec.prepare(parts), Sampling(1), labels=tuple(self._codec.encode_labels(parts, ["a"])))
        probabilities = self._engine.submit(scored).result().probabilities
        if not said.ids or not all(map(math.isfinite, probabilities)):
            raise SetupFailed(NO_ANSWER)


class _Run:
    """A job's thread: what it may be told from outside."""

    def __init__(self, ticket: Ticket, deadline: float | None) -> None:
        self.ticket = ticket
        self.deadline = deadline
        self.row: Row | None = None
        self.canceled = False
        self.queued_s = 0.0 if ticket.submitted_at is None else max(0.0, time.time() - ticket.submitted_at)

    def check(self) -> None:
        """Raises Canceled or DeadlineExceeded where the job need not go on."""
        if self.canceled:
            raise Canceled
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded(
                "The job's deadline passed before its model could start: add workers or allow more time."
            )


def _deadline(job: Job, ticket: Ticket) -> float | None:
    """time.monotonic() at which the job ends with what it has."""
    limits = []
    if job.deadline_s is not None:
        submitted = time.time() if ticket.submitted_at is None else ticket.submitted_at
        limits.append(submitted + job.deadline_s - time.time())
    if ticket.soft_limit_s is not None:
        limits.append(ticket.soft_limit_s)
    return time.monotonic() + min(limits) if limits else None


def _labels(job: Job) -> list[str]:
    return job.labels if isinstance(job, Classify) else []


def _spoken_labels(job: Job) -> list[str]:
    return job.spoken_labels if isinstance(job, Classify) else []


def _until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]


def _fetch_policy(settings: Settings) -> FetchPolicy:
    return FetchPolicy(
        allow_networks=settings.image_allow_networks,
        allow_domains=settings.image_allow_domains,
        ports=settings.image_ports,
        max_bytes=settings.image_max_bytes,
        root=settings.image_root,
        total_s=settings.image_timeout_s,
        host_concurrency=settings.image_host_concurrency,
        contact=settings.contact,
        max_redirects=settings.image_max_redirects,
        ca_file=settings.ca_file,
    )
