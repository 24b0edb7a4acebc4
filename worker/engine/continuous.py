"""Continuous batching: rows join and leave a running batch at any step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tasks.payloads import ModelInfo
from worker.engine.engine import Beat, Newcomers
from worker.engine.progress import Progress
from worker.engine.row import Row
from worker.engine.runner import StockModel, memory_errors
from worker.engine.sampling import RowSampler
from worker.models.idefics import IdeficsAdapter
from worker.models.idefics_decoder import IdeficsDecoder

#: Prompt tokens, padding included, that are read at once: more would hold up the running rows, and need memory.
PREFILL_TOKENS = 4096


class ContinuousModel(StockModel):
    """IDEFICS on a decoder of our own, token for token what stock `generate` says in float32.

    Beams still run through stock `generate`.
    """

    def __init__(self, adapter: IdeficsAdapter, info: ModelInfo, max_tokens: int) -> None:
        super().__init__(adapter, info, max_tokens)
        self._decoder = IdeficsDecoder(adapter.model)
        self._image_id = adapter.image_id
        self._features = adapter.features
        self._forbidden = [token for [token] in adapter.bad_words_ids]
        #: By slot of the decoder.
        self._running: list[tuple[Progress, RowSampler | None]] = []

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None:
        """See engine.Runner."""
        if rows[0].sampling.num_beams > 1:
            super().run(rows, beat, newcomers)
            return
        try:
            with memory_errors():
                self._run_on(rows, beat, newcomers)
        finally:
            # What failed on the way left rows behind.
            self._running.clear()
            self._decoder.clear()

    def _run_on(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None:
        self._join(rows, beat)
        while self._running:
            self._advance(self._decoder.step([progress.last for progress, _ in self._running]), first=0)
            beat()
            joining = newcomers([progress.row for progress, _ in self._running])
            if joining:
                self._join(joining, beat)

    def _join(self, rows: Sequence[Row], beat: Beat) -> None:
        self._count_cached(rows)
        scored = [row for row in rows if row.labels]
        if scored:
            self._score(scored, beat)
        for chunk in _chunks([row for row in rows if not row.labels]):
            self._prefill(chunk)
            beat()

    def _prefill(self, rows: Sequence[Row]) -> None:
        features = self._features(picture for row in rows for picture in row.tokens.pictures)
        images = [[features[picture.key] for picture in row.tokens.pictures] for row in rows]
        logits = self._decoder.prefill([row.tokens.ids for row in rows], images, self._image_id)
        first = len(self._running)
        for row in rows:
            sampler = RowSampler(row.sampling) if row.sampling.temperature > 0 else None
            self._running.append((Progress(row, self.decode), sampler))
        self._advance(logits, first)

    def _advance(self, logits: Tensor, first: int) -> None:
        """Give each slot from `first` on its next token, and free the slots of rows that are over."""
        logits[:, self._forbidden] = -torch.inf
        for slot, (_, sampler) in enumerate(self._running[first:]):
            if sampler is not None:
                logits[slot] = sampler.perturb(logits[slot])
        now = time.monotonic()
        for (progress, _), token in zip(self._running[first:], logits.argmax(dim=-1).tolist(), strict=True):
            progress.take(token, now)
        for slot in reversed(range(first, len(self._running))):
            if self._running[slot][0].row.is_done:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        self._decoder.release(slot)
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of like length together, as many as PREFILL_TOKENS allow with their padding, one at least."""
    chunk: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.tokens.ids)):
        if chunk and (len(chunk) + 1) * len(row.tokens.ids) > PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
