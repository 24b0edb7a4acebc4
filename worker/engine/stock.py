"""Rows through transformers' own `generate`: the path for any family, one batch at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tasks.errors import OutOfMemory
from tasks.payloads import ModelInfo
from worker.engine.generation import NO_RULES, GenerationRules
from worker.engine.interfaces import Beat, Codec, Newcomers
from worker.engine.processors import BatchRules
from worker.engine.progress import Decode, Progress, has_stop
from worker.engine.row import FinishReason, Output, Picture, Row, Tokens
from worker.engine.sampling import RowSampling
from worker.engine.scoring import finish_scored, overflow
from worker.engine.stock_scoring import label_log_likelihoods

#: What a plain RuntimeError of torch says where a processor, or a GPU's library for products, had no memory.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StockCodec(Codec, Protocol):
    """A codec whose prompts stock `generate` continues."""

    #: Token sequences that no answer may hold.
    bad_words_ids: list[list[int]]


class Adapter(Protocol):
    """What a family adds to transformers' common interface; see worker.models.idefics1.adapter."""

    model: PreTrainedModel

    @property
    def codec(self) -> StockCodec: ...
    def look(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None: ...
    def catch_up(self, within_s: float) -> bool: ...
    def figures(self) -> dict[str, int]: ...
    def inputs(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]: ...
    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]: ...


class StockModel:
    """A family's checkpoint, run by stock `generate`. In float32 each row's tokens are those it gets alone."""

    def __init__(self, adapter: Adapter, info: ModelInfo, max_tokens: int, rules: GenerationRules = NO_RULES) -> None:
        """`rules`: the checkpoint's, which its own generation config no longer holds."""
        self.info = info
        self.rules = rules
        self.codec = adapter.codec
        self.look = adapter.look
        self.catch_up = adapter.catch_up
        self.adapter = adapter
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None:
        """See engine.Runner: rows of one number of beams, and rows with labels. Nobody joins them."""
        with memory_errors():
            self._run(rows, beat)

    def figures(self) -> dict[str, int]:
        """What the caches hold and spared."""
        return self.adapter.figures()

    def _run(self, rows: Sequence[Row], beat: Beat) -> None:
        scored = [row for row in rows if row.labels and not row.is_done]
        continued = [row for row in rows if not row.labels and not row.is_done]
        if scored:
            self._score(scored, beat)
        if continued and continued[0].sampling.num_beams == 1:
            self._continue(continued, beat)
        elif continued:
            self._search(continued, beat)

    def _score(self, rows: Sequence[Row], beat: Beat) -> None:
        inputs = self.adapter.forward_inputs(self.adapter.inputs([row.tokens for row in rows]))
        labels = [row.labels for row in rows]
        likelihoods = label_log_likelihoods(self.adapter.model, inputs, labels, self.max_tokens, beat)
        finish_scored(rows, likelihoods)

    def _continue(self, rows: Sequence[Row], beat: Beat) -> None:
        inputs = self.adapter.inputs([row.tokens for row in rows])
        self.adapter.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(row.wanted for row in rows),
            eos_token_id=sorted(self.codec.end_ids(utterance=False)),
            bad_words_ids=self.codec.bad_words_ids,
            logits_processor=LogitsProcessorList([Overflow(rows), *self._batch_rules(rows, inputs), RowSampling(rows)]),
            stopping_criteria=StoppingCriteriaList([RowStopping(rows, self.codec.decode, beat)]),
        )

    def _batch_rules(self, rows: Sequence[Row], inputs: dict[str, Tensor]) -> list[LogitsProcessor]:
        ids = inputs["input_ids"]
        return [BatchRules(rows, self.rules.scores, ids.device, ids.shape[1])] if self.rules.scores else []

    def _search(self, rows: Sequence[Row], beat: Beat) -> None:
        # The rules see a prompt's padding, and beams of different prompts share no state: each prompt alone.
        for part in [[row] for row in rows] if self.rules.scores else [rows]:
            self._search_together(part, beat)

    def _search_together(self, rows: Sequence[Row], beat: Beat) -> None:
        inputs = self.adapter.inputs([row.tokens for row in rows])
        sampling = rows[0].sampling
        sequences = self.adapter.model.generate(
            **inputs,
            do_sample=False,
            num_beams=sampling.num_beams,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(sampling.end_ids),
            **{
                **self.rules.scores,
                **self.rules.beams,
                "bad_words_ids": [*self.codec.bad_words_ids, *self.rules.scores.get("bad_words_ids", [])],
            },
            logits_processor=LogitsProcessorList([Overflow(rows)]),
            stopping_criteria=StoppingCriteriaList([AllInterrupted(rows, beat)]),
        )
        for row, sequence in zip(rows, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if not row.is_done:
                row.finish(_search_output(row, sequence, self.codec.decode))


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """A device without memory as our OutOfMemory."""
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


def _search_output(row: Row, sequence: list[int], decode: Decode) -> Output:
    """A beam's tokens up to their end; what follows it is padding."""
    end = next((n for n, token in enumerate(sequence) if token in row.sampling.end_ids), None)
    ids = tuple(sequence[:end])
    reason: FinishReason = "length" if end is None else "stop"
    if has_stop(decode(ids), row.sampling.stop):
        # As a greedy row's, whose last token completes the stop string.
        ids = next(ids[:n] for n in range(1, len(ids) + 1) if has_stop(decode(ids[:n]), row.sampling.stop))
        reason = "stop_sequence"
    return Output(ids, row.interruption(time.monotonic()) or reason)


class Overflow(LogitsProcessor):  # type: ignore[misc]
    """Fails each row whose scores are not numbers."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        are_bad = scores.isnan().view(len(self._rows), -1).any(dim=1).tolist()
        for row, is_bad in zip(self._rows, are_bad, strict=True):
            if is_bad and not row.is_done:
                row.fail(overflow())
        return scores


class RowStopping(StoppingCriteria):  # type: ignore[misc]
    """Ends each row by its own rules, and finishes it at that very step: it need not wait for its batch."""

    def __init__(self, rows: Sequence[Row], decode: Decode, beat: Beat) -> None:
        self._progress = [Progress(row, decode) for row in rows]
        self._beat = beat

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._beat()
        now = time.monotonic()
        for progress, token in zip(self._progress, input_ids[:, -1].tolist(), strict=True):
            if not progress.row.is_done:
                progress.take(token, now)
        return torch.tensor([progress.row.is_done for progress in self._progress], device=input_ids.device)


class AllInterrupted(StoppingCriteria):  # type: ignore[misc]
    """Ends a beam search once nobody waits for it. Single rows cannot leave it."""

    def __init__(self, rows: Sequence[Row], beat: Beat) -> None:
        self._rows = rows
        self._beat = beat

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._beat()
        now = time.monotonic()
        over = all(row.is_done or row.interruption(now) for row in self._rows)
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)
