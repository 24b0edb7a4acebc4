"""One job from its payload to its result, in a thread of the model process.

The thread loads the job's images, submits a row to the engine and waits. So downloads overlap with computing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from config.settings import Settings
from tasks.calibration import Calibration, CalibrationError, read_calibration
from tasks.errors import InvalidRequest, JobError, OutOfMemory
from tasks.payloads import Job
from tasks.results import ModelInfo, Result, Timing
from worker.engine.generation_rules import NO_RULES, GenerationRules
from worker.engine.interfaces import Codec
from worker.engine.row import NotBegun, Output, Picture, Row
from worker.engine.throughput import Throughput
from worker.images.copies import PictureCopies
from worker.images.download_limits import DownloadLimits
from worker.images.host_limits import HostLimitReached
from worker.images.loader import ImageLoader
from worker.jobs.answer_cache import AnswerCache
from worker.jobs.canary import Canary
from worker.jobs.golden_check import GoldenCheck
from worker.jobs.live_updates import NO_UPDATES, LiveUpdates
from worker.jobs.prompts import ImageRef
from worker.jobs.receipts import Receipts
from worker.jobs.result_builder import ResultBuilder
from worker.jobs.reviews import Reviews, picture_copies
from worker.jobs.row_builder import RowBuilder, joined, others
from worker.jobs.run_metrics import count_abstained, count_answer, observe_row
from worker.jobs.runs import CancellationError, JobContext, Run, RunRegistry, deadline_of
from worker.models import SetupFailed
from worker.observability.metrics import JOBS_LOADING_IMAGES, STAGES
from worker.runtime import gil


class EngineProtocol(Protocol):
    """An engine of this process or of another."""

    def submit(self, row: Row) -> Future[Output]: ...

    def cancel(self, row: Row) -> None:
        """End a row at the next step, in any state. Its output then says `canceled`."""

    @property
    def throughput(self) -> Throughput:
        """The number and speed of running rows."""

    def expecting(self) -> AbstractContextManager[None]:
        """While the block runs, a row is expected soon."""

    def withdraw(self, rows: Sequence[Row], most: int) -> list[Row]:
        """Remove rows that have not begun; the caller fails them."""


class Service:
    """Answers jobs on one model. `run` is called from many threads at once."""

    def __init__(
        self,
        settings: Settings,
        info: ModelInfo,
        codec: Codec,
        engine: EngineProtocol,
        answers: AnswerCache | None = None,
        rules: GenerationRules = NO_RULES,
        downloads: DownloadLimits | None = None,
        live: LiveUpdates | None = None,
        receipts: Receipts | None = None,
        canary: Canary | None = None,
        reviews: Reviews | None = None,
    ) -> None:
        """`rules`: the checkpoint's generation parameters; each result lists those that applied to it. `downloads`: see
        ImageLoader. `live`: writes the updates of streamed jobs. Raises SetupFailed for another model's calibration."""
        self._info = info
        self._max_images = settings.max_images
        self._engine = engine
        self._answers = answers
        self._live = live
        self._images = ImageLoader(settings, codec.picture, engine.expecting, downloads)
        self._rows = RowBuilder(settings, codec, rules)
        self._results = ResultBuilder(info, codec, rules, _calibration(settings, info))
        self._receipts = receipts or Receipts(info)
        self._canary = canary
        self._reviews = reviews
        self._runs = RunRegistry()
        self._golden_check = GoldenCheck(info, codec, self._rows, self._images.open, engine.submit)

    @property
    def model(self) -> ModelInfo:
        """The model that answers."""
        return self._info

    @property
    def throughput(self) -> Throughput:
        """The engine's throughput, in jobs. Jobs that load images from the network take no place in it."""
        throughput = self._engine.throughput
        return throughput._replace(capacity=throughput.capacity + self._images.jobs_on_network)

    def prepare(self) -> None:
        """Do what would halt the engine at the first job with a `response_format`."""
        self._rows.prepare()

    def check_golden(self, folder: Path | None) -> None:
        """Check the model's answers before it serves. Raises SetupFailed."""
        self._golden_check.run(folder)

    def run(self, job: Job, context: JobContext) -> Result:
        """Answer a job. Raises a JobError, CancellationError, HostLimitReached, or NotBegun where it was withdrawn."""
        updates = self._live.begin(job, context.id) if self._live else NO_UPDATES
        run = Run(context, deadline_of(job, context), updates)
        STAGES["queued"].observe(run.queued_s)
        with contextlib.closing(updates), self._runs.running(run):
            try:
                return self._answer(job, run)
            except MemoryError:
                # The allocation failed, so the process can go on.
                raise OutOfMemory from None
            except (JobError, HostLimitReached):
                if run.is_canceled:
                    # A canceled job must not be retried for its error.
                    raise CancellationError from None
                raise

    def cancel(self, id: str) -> bool:
        """End a job: before it starts, or at its next step. True if it still loads images, so has no text."""
        self._runs.cancel(id)
        run = self.abandon(id)
        return run is not None and run.row is None

    def abandon(self, id: str) -> Run | None:
        """End a job's current run, if there is one, at its next step. Another run of the job may follow."""
        run = self._runs.abandon(id)
        if run is not None and run.row is not None:
            self._engine.cancel(run.row)
        return run

    def is_canceled(self, id: str) -> bool:
        return self._runs.is_canceled(id)

    def forget(self, id: str) -> None:
        """The job has ended: a later one with its id is a new job."""
        self._runs.forget(id)

    @contextlib.contextmanager
    def withdrawn(self, ids: Sequence[str], most: int) -> Iterator[list[str]]:
        """Withdraw up to `most` of these jobs that have not begun from the engine.

        Yields their ids; after the block their runs end with NotBegun.
        """
        by_row = {run.row: run.context.id for run in self._runs.of(ids) if run.row is not None}
        rows = self._engine.withdraw(list(by_row), most)
        try:
            yield [by_row[row] for row in rows]
        finally:
            for row in rows:
                row.fail(NotBegun())

    def _answer(self, job: Job, run: Run) -> Result:
        new_tokens = self._rows.new_tokens(job)
        started = time.monotonic()
        run.check()
        # One that is refused costs no download.
        self._rows.grammar(job)
        parts, copies = self._load_images(job, run)
        run.check()
        row = self._rows.build(job, parts, new_tokens, run.context.priority, run.deadline)
        tokens = row.tokens
        if run.context.is_alone:
            row.alone, row.tokens = True, tokens.apart(os.urandom(8))
        fetched = time.monotonic()
        self._runs.attach(run, row)
        run.updates.follow(row)
        with gil.released():
            output = self._output(row)
        ended = time.monotonic()
        observe_row(row, ended)
        timing = Timing(
            queued_s=round(run.queued_s, 6),
            fetch_s=round(fetched - started, 6),
            wait_s=round(max(0.0, row.started - fetched), 6),
            generate_s=round(ended - (row.started or ended), 6),
            retries=run.context.retries,
        )
        receipt = self._receipts.receipt(tokens, row, output, run.context)
        result = self._results.build(job, row, output, timing, receipt)
        # A label is no text that grows.
        run.updates.finish("" if result.label else result.text)
        count_answer(result.usage)
        if output.finish_reason == "canceled":
            raise CancellationError(result)
        if result.abstained and not row.alone:
            count_abstained(job.task)
            if self._reviews:
                self._reviews.add(job, run.context, result, copies)
        if self._canary and not row.alone:
            self._canary.offer(run.context.id, row, output, receipt)
        return result

    def _load_images(self, job: Job, run: Run) -> tuple[list[str | Picture], PictureCopies | None]:
        """The prompt with its pictures in place, and copies for a reviewer if the answer may be doubtful.

        Raises a JobError, or HostLimitReached.
        """
        prompt = self._rows.prompt(job)
        sources = [part.source for part in prompt if isinstance(part, ImageRef)]
        if len(sources) > self._max_images:
            raise InvalidRequest(f"The job shows {len(sources)} images: this worker takes at most {self._max_images}.")
        if sources:
            run.updates.loading_images()
        may_abstain = self._reviews is not None and job.min_confidence is not None
        copies = picture_copies(job, len(sources), self._images.copy) if may_abstain else None
        with JOBS_LOADING_IMAGES.track_inprogress() if sources else contextlib.nullcontext():
            pictures = iter(self._images.load(sources, copies))
        return [next(pictures) if isinstance(part, ImageRef) else part for part in prompt], copies

    def _output(self, row: Row) -> Output:
        if self._answers is None or row.alone:
            return self._compute(row)
        return self._answers.output(row, self._info, self._compute)

    def _compute(self, row: Row) -> Output:
        # Not before the answer cache has seen that it has none.
        row.sampling = row.sampling.with_seed()
        further = others(row)
        if not further:
            return self._engine.submit(row).result()
        running = [self._engine.submit(each) for each in (row, *further)]
        try:
            return joined([each.result() for each in running])
        except BaseException:
            self._engine.cancel(row)
            raise


def _calibration(settings: Settings, info: ModelInfo) -> Calibration | None:
    """The calibration that the settings name. Raises SetupFailed if it is not this model's."""
    if settings.calibration is None:
        return None
    try:
        calibration = read_calibration(settings.calibration)
        calibration.check_model(info.id, info.revision)
    except CalibrationError as error:
        raise SetupFailed(f"IDEFICS_CALIBRATION: {error}") from None
    return calibration
