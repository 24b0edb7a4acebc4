"""Runs rows through transformers' own `generate`: works for every family, one batch at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tasks.errors import OutOfMemory
from tasks.results import ModelInfo
from worker.engine.beam_scores import BeamRecorder, search_output
from worker.engine.generation_rules import NO_RULES, GenerationRules
from worker.engine.interfaces import Admit, Codec, Encode, EnginePath, SendHeartbeat
from worker.engine.logits_processors import BatchRules, rules_of
from worker.engine.pauses import without_pauses
from worker.engine.penalties import StockPenalties
from worker.engine.progress import RowProgress, grammars_going_on
from worker.engine.row import Picture, Row, Sampling, Tokens
from worker.engine.sampling import RowSampling
from worker.engine.scoring import finish_scored, overflow
from worker.engine.step_metrics import count_step, phase
from worker.engine.stock_prefill import CHUNK_TOKENS, PaddedPrompts, Prefilled, prefill
from worker.engine.stock_scoring import label_log_likelihoods
from worker.engine.token_masks import TokenMasks
from worker.engine.token_scores import ScoreRecorder

#: Messages of torch's plain RuntimeErrors for a lack of memory on a CPU or in a GPU's matrix library.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StockCodec(Codec, Protocol):
    """A codec for prompts that stock `generate` continues."""

    #: Token sequences that answers must not contain.
    bad_words_ids: list[list[int]]


class Adapter(Protocol):
    """A family's additions to transformers' common interface. Example: worker.models.idefics1.adapter."""

    model: PreTrainedModel

    @property
    def codec(self) -> StockCodec: ...

    @property
    def encode(self) -> Encode: ...

    @property
    def steady_tokens(self) -> int | None:
        """Maximum tokens of a prompt and its answer if a token's rotary embedding is to depend on its position only. In
        longer rows it changes with the length of the longest row of their batch. None: it never does."""

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """Encode pictures, then call `then`, as interfaces.Runner.prefetch does."""

    def help(self, within_s: float) -> bool:
        """Encode waiting pictures, as interfaces.Runner.help does."""

    def metrics(self) -> dict[str, int]:
        """Counters of the family's caches."""

    def padded(self, prompts: Sequence[Tokens], features: Mapping[bytes, Tensor]) -> PaddedPrompts:
        """Prompts padded on the left, with the features of their pictures by key."""


class StockModel:
    """A checkpoint run by stock `generate`. In float32 a row's tokens do not depend on the other rows."""

    def __init__(
        self,
        adapter: Adapter,
        info: ModelInfo,
        max_tokens: int,
        rules: GenerationRules = NO_RULES,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """`max_tokens`: maximum tokens whose keys and values label scoring holds, without those of the prompts.
        `rules`: the checkpoint's, removed from the model's own generation config. `chunk_tokens`: see CHUNK_TOKENS."""
        self.info = info
        self.rules = rules
        self.codec = adapter.codec
        self.prefetch = adapter.prefetch
        self.help = adapter.help
        self.adapter = adapter
        self.max_tokens = max_tokens
        self._chunk_tokens = chunk_tokens
        reserved = [id for id in self.codec.reserved_ids if id < self.codec.vocabulary]
        self.masks = TokenMasks(reserved, adapter.model.device)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        """Run rows: see interfaces.Runner. Never calls `admit`."""
        with memory_errors():
            self._run(rows, heartbeat)

    def path(self, row: Row) -> EnginePath:
        """Stock `generate`, for every row."""
        return "stock"

    def metrics(self) -> dict[str, int]:
        """Counters of the family's caches."""
        return self.adapter.metrics()

    def _run(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> None:
        for part in self._parts([row for row in rows if row.labels and not row.is_done]):
            self._score(part, heartbeat)
        kinds: dict[Hashable, list[Row]] = {}
        for row in rows:
            if not row.labels and not row.is_done:
                kinds.setdefault(_kind(row.sampling), []).append(row)
        for alike in kinds.values():
            for part in self._parts(alike):
                run = self._continue if part[0].sampling.num_beams == 1 else self._search
                run(part, heartbeat)

    def _parts(self, rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
        """Divide rows into those that run together: all, but for those that would change the others' embeddings."""
        alone = [row for row in rows if not self._is_steady(row)]
        together = [row for row in rows if self._is_steady(row)]
        return [part for part in (together, *([row] for row in alone)) if part]

    def _is_steady(self, row: Row) -> bool:
        longest = len(row.tokens.ids) + max(row.max_steps, *map(len, row.labels), 0)
        return self.adapter.steady_tokens is None or longest <= self.adapter.steady_tokens

    def _score(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> None:
        prefilled = self._prefill(rows, heartbeat)
        labels = [row.labels for row in rows]
        with phase("score"):
            likelihoods = label_log_likelihoods(self.adapter.model, prefilled, labels, self.max_tokens, heartbeat)
        finish_scored(rows, likelihoods)

    def _continue(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> None:
        recorder = ScoreRecorder()
        progress = [RowProgress(row, self.codec.decode) for row in rows]
        grammars = [Grammars(progress, self.masks)] if any(row.grammar for row in rows) else []
        self._generate(
            rows,
            heartbeat,
            num_beams=1,
            max_new_tokens=max(row.max_steps for row in rows),
            eos_token_id=sorted(self.codec.eos_ids),
            bad_words_ids=self.codec.bad_words_ids,
            logits_processor=LogitsProcessorList(
                [
                    Overflow(rows),
                    self._penalties(rows),
                    *self._batch_rules(rows),
                    *grammars,
                    recorder,
                    RowSampling(rows),
                ]
            ),
            stopping_criteria=StoppingCriteriaList([RowStopping(progress, self.masks, heartbeat, recorder)]),
        )

    def _penalties(self, rows: Sequence[Row], num_beams: int = 1) -> StockPenalties:
        return StockPenalties(rows, num_beams, _longest(rows), self.adapter.model.device)

    def _batch_rules(self, rows: Sequence[Row]) -> list[LogitsProcessor]:
        device = self.adapter.model.device
        return [BatchRules(rows, self.rules.scores, device, _longest(rows))] if self.rules.scores else []

    def _search(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> None:
        # Each prompt runs alone if transformers would apply the rules to the padding of a batch.
        for part in [[row] for row in rows] if self.rules.depend_on_padding else [rows]:
            self._search_together(part, heartbeat)

    def _search_together(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> None:
        sampling = rows[0].sampling
        rules = rules_of(sampling, self.rules.scores)
        # The search compares so many tokens of each row.
        compared = max(2, 1 + len(sampling.eos_ids)) * sampling.num_beams
        asked = max(row.sampling.logprobs or 0 for row in rows)
        recorder = BeamRecorder(sampling.num_beams, _longest(rows), max(compared, asked))
        sequences = self._generate(
            rows,
            heartbeat,
            num_beams=sampling.num_beams,
            num_return_sequences=sampling.answers,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(sampling.eos_ids),
            **{
                **rules,
                **self.rules.beams,
                "bad_words_ids": [*self.codec.bad_words_ids, *rules.get("bad_words_ids", [])],
            },
            logits_processor=LogitsProcessorList([Overflow(rows), self._penalties(rows, sampling.num_beams), recorder]),
            stopping_criteria=StoppingCriteriaList([AllAborted(rows, heartbeat)]),
        )
        for number, (row, answers) in enumerate(zip(rows, torch.split(sequences, sampling.answers), strict=True)):
            if not row.is_done:
                best, *others = (
                    search_output(row, ids, self.codec.decode, functools.partial(recorder.of, number))
                    for ids in answers.tolist()
                )
                row.finish(dataclasses.replace(best, others=tuple(others)))

    def _generate(self, rows: Sequence[Row], heartbeat: SendHeartbeat, num_beams: int, **options: Any) -> Tensor:
        """The new tokens (rows, length) of stock `generate`, with padding after their end."""
        prefilled = self._prefill(rows, heartbeat)
        prompts = prefilled.prompts
        with phase("decode"):
            sequences: Tensor = self.adapter.model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask,
                past_key_values=prefilled.continued_cache(num_beams),
                do_sample=False,
                num_beams=num_beams,
                **prompts.generate_inputs(),
                **options,
            )
        return sequences[:, prompts.ids.shape[1] :]

    def _prefill(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> Prefilled:
        """Prefill the prompts of rows. Their pictures are encoded in chunks if they are not cached.

        A row that is not steady is prefilled in one forward pass, as by stock `generate`: it sends no heartbeat.
        """
        pictures = (picture for row in rows for picture in row.tokens.pictures)
        features = without_pauses(self.adapter.encode(pictures), heartbeat)
        prompts = self.adapter.padded([row.tokens for row in rows], features)
        chunk_tokens = self._chunk_tokens if self._is_steady(rows[0]) else prompts.ids.shape[1]
        with phase("prefill"):
            return prefill(self.adapter.model, prompts, heartbeat, chunk_tokens)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's errors for a lack of memory into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory() from error


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def _kind(sampling: Sampling) -> Hashable:
    """A key that is equal for rows that run together: all without beams; of those with beams, like ones."""
    if sampling.num_beams == 1:
        return None
    has_penalty = sampling.repetition_penalty is not None
    return sampling.num_beams, sampling.max_new_tokens, sampling.eos_ids, sampling.answers, has_penalty


def _longest(rows: Sequence[Row]) -> int:
    """Tokens of the longest prompt."""
    return max(len(row.tokens.ids) for row in rows)


class Overflow(LogitsProcessor):  # type: ignore[misc]
    """Fails each row whose scores are NaN."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows times beams, vocabulary) unchanged. `input_ids`: (rows times beams, length)."""
        are_bad = scores.isnan().view(len(self._rows), -1).any(dim=1).tolist()
        for row, is_bad in zip(self._rows, are_bad, strict=True):
            if is_bad and not row.is_done:
                row.fail(overflow())
        return scores


class Grammars(LogitsProcessor):  # type: ignore[misc]
    """Keeps each row with a grammar to it."""

    def __init__(self, progress: Sequence[RowProgress], masks: TokenMasks) -> None:
        self._progress = progress
        self._masks = masks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask scores (rows, vocabulary) in place. `input_ids`: (rows, length)."""
        states = {
            place: progress.grammar
            for place, progress in enumerate(self._progress)
            if progress.grammar and not progress.row.is_done
        }
        if states:
            self._masks.apply(scores, states)
        return scores


class RowStopping(StoppingCriteria):  # type: ignore[misc]
    """Ends each row by its own conditions, and finishes it at that step, without waiting for its batch."""

    def __init__(
        self, progress: Sequence[RowProgress], masks: TokenMasks, heartbeat: SendHeartbeat, recorder: ScoreRecorder
    ) -> None:
        self._progress = progress
        self._masks = masks
        self._heartbeat = heartbeat
        self._recorder = recorder
        counts = [each.row.sampling.logprobs for each in progress]
        self._asked = {place: count for place, count in enumerate(counts) if count}

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Which rows are done (rows,). `input_ids`: all tokens (rows, length)."""
        self._heartbeat()
        count_step(sum(not progress.row.is_done for progress in self._progress))
        now = time.monotonic()
        for progress, score in zip(self._progress, self._recorder.of(input_ids[:, -1], self._asked), strict=True):
            if not progress.row.is_done:
                progress.take(score, now)
        self._masks.compute(grammars_going_on(self._progress))
        return torch.tensor([progress.row.is_done for progress in self._progress], device=input_ids.device)


class AllAborted(StoppingCriteria):  # type: ignore[misc]
    """Ends a beam search once all its rows are aborted, since single rows cannot leave it."""

    def __init__(self, rows: Sequence[Row], heartbeat: SendHeartbeat) -> None:
        self._rows = rows
        self._heartbeat = heartbeat

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Whether the beams are done (rows times beams,), all or none. `input_ids`: (rows times beams, length)."""
        self._heartbeat()
        count_step(input_ids.shape[0])
        now = time.monotonic()
        is_done = all(row.is_done or row.abort_reason(now) for row in self._rows)
        return torch.full((input_ids.shape[0],), is_done, device=input_ids.device)
