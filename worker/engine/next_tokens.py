"""The next tokens of a batch: chosen on the device, and read by the host in one transfer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from worker.engine.generation_rules import GenerationRules
from worker.engine.logits_processors import RowRules
from worker.engine.penalties import Penalties
from worker.engine.progress import RowProgress
from worker.engine.row import Row, TokenScore
from worker.engine.sampling import BatchSampler, RowSampler
from worker.engine.stop_strings import Decode
from worker.engine.tensors import to_device
from worker.engine.token_masks import TokenMasks
from worker.engine.token_scores import NO_TOKEN, best, chosen, read
from worker.engine.traced import Traced


class Running(NamedTuple):
    """A row that is continued: greedily if it has no sampler."""

    progress: RowProgress
    sampler: RowSampler | None
    rules: RowRules | None


@dataclass(frozen=True, slots=True)
class NewState:
    """Makes the state of rows that begin. `rules`: the checkpoint's."""

    rules: GenerationRules
    decode: Decode
    device: torch.device

    def __call__(self, row: Row) -> Running:
        """The state of a row without tokens."""
        sampler = RowSampler(row.sampling) if row.sampling.temperature > 0 else None
        rules = RowRules(row, self.rules.scores, self.device) if self.rules.scores else None
        return Running(RowProgress(row, self.decode), sampler, rules)


class NextTokens:
    """Chooses the next token of each row of a batch: the likeliest one, or a sample."""

    def __init__(self, forbidden: Iterable[int], device: torch.device, masks: TokenMasks) -> None:
        """`forbidden`: tokens that no answer contains. `masks`: of the rows with grammars."""
        self._forbidden = to_device(list(forbidden), device, torch.long)
        self._device = device
        self._masks = masks
        self._best = Traced(best)
        self._penalties = Penalties(device)
        #: Those of the last batch's sampled rows, by the row's index.
        self._samplers: dict[int, RowSampler] = {}
        self._batch_sampler: BatchSampler | None = None

    def choose(self, logits: Tensor, rows: Mapping[int, Running]) -> list[TokenScore]:
        """The next token of each row of `logits` (rows, vocabulary), which are changed; NO_TOKEN for those with NaN.

        `rows`: the rows that are continued, by index. The others' tokens are any. The host waits for the device once,
        at the end, unless the checkpoint has rules that need more.
        """
        logits = self._penalties.apply(logits, {place: run.progress for place, run in rows.items()})
        self._apply_rules(logits, rows)
        likeliest = self._best(logits, self._forbidden)
        scores = self._sampled(likeliest, logits, rows)
        if scores is not likeliest:
            scores[0].masked_fill_(likeliest[0] == NO_TOKEN, NO_TOKEN)
        asked = {place: run.progress.row.sampling.logprobs for place, run in rows.items()}
        return read(scores, logits, {place: count for place, count in asked.items() if count})

    def _apply_rules(self, logits: Tensor, rows: Mapping[int, Running]) -> None:
        """Apply the checkpoint's rules and the rows' grammars to `logits` in place. Rows with NaN stay as they are."""
        for place, run in rows.items():
            if run.rules:
                row = logits[place]
                logits[place] = torch.where(row.isnan().any(), row, run.rules.apply(run.progress.new, row))
        grammars = {place: grammar for place, run in rows.items() if (grammar := run.progress.grammar)}
        if grammars:
            self._masks.apply(logits, grammars)

    def _sampled(self, likeliest: Tensor, logits: Tensor, rows: Mapping[int, Running]) -> Tensor:
        """The tokens' scores (3, rows): of samples for the sampled rows, and `likeliest` for the others."""
        samplers = {place: run.sampler for place, run in rows.items() if run.sampler}
        if not samplers:
            return likeliest
        if self._batch_sampler is None or samplers != self._samplers:
            self._samplers = samplers
            self._batch_sampler = BatchSampler(samplers, self._device, logits.shape[1])
        drawn = self._batch_sampler.draw(logits, [len(rows[place].progress.new) for place in samplers])
        tokens = likeliest[0].long().index_copy(0, self._batch_sampler.places, drawn)
        return chosen(logits, likeliest[2], tokens.clamp(min=0))
