"""The next tokens of a batch: chosen on the device, and read by the host in one transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker.engine.logits_processors import RowRules
from worker.engine.progress import RowProgress
from worker.engine.sampling import BatchSampler, RowSampler
from worker.engine.tensors import to_device
from worker.engine.traced import Traced

#: The next token of a row whose logits are NaN.
NO_TOKEN = -1


class Running(NamedTuple):
    """A row that is continued: greedily if it has no sampler."""

    progress: RowProgress
    sampler: RowSampler | None
    rules: RowRules | None


class NextTokens:
    """Chooses the next token of each row of a batch: the likeliest one, or a sample."""

    def __init__(self, forbidden: Sequence[int], device: torch.device) -> None:
        """`forbidden`: tokens that no answer contains."""
        self._forbidden = to_device(list(forbidden), device, torch.long)
        self._device = device
        self._best = Traced(best)
        #: Those of the last batch's sampled rows, by the row's index.
        self._samplers: dict[int, RowSampler] = {}
        self._batch_sampler: BatchSampler | None = None

    def choose(self, logits: Tensor, rows: Mapping[int, Running]) -> list[int]:
        """The next token of each row of `logits` (rows, vocabulary), which are changed; NO_TOKEN for those with NaN.

        `rows`: the rows that are continued, by index. The others' tokens are any. The host waits for the device once,
        at the end, unless the checkpoint has rules that need more.
        """
        likeliest = self._best(logits, self._forbidden)
        chosen = self._sampled(self._ruled(likeliest, logits, rows), logits, rows)
        if chosen is not likeliest:
            chosen = torch.where(likeliest == NO_TOKEN, NO_TOKEN, chosen)
        tokens: list[int] = chosen.tolist()
        return tokens

    def _ruled(self, likeliest: Tensor, logits: Tensor, rows: Mapping[int, Running]) -> Tensor:
        """The likeliest tokens (rows,) after the checkpoint's rules, which are applied to `logits` in place."""
        ruled = [(place, run.progress.new, run.rules) for place, run in rows.items() if run.rules]
        for place, new, rules in ruled:
            logits[place] = rules.apply(new, logits[place])
        return self._best(logits, self._forbidden) if ruled else likeliest

    def _sampled(self, likeliest: Tensor, logits: Tensor, rows: Mapping[int, Running]) -> Tensor:
        """The tokens (rows,): samples for the sampled rows, and `likeliest` for the others."""
        samplers = {place: run.sampler for place, run in rows.items() if run.sampler}
        if not samplers:
            return likeliest
        if self._batch_sampler is None or samplers != self._samplers:
            self._samplers = samplers
            self._batch_sampler = BatchSampler(samplers, self._device, logits.shape[1])
        drawn = self._batch_sampler.draw(logits, [len(rows[place].progress.new) for place in samplers])
        return likeliest.index_copy(0, self._batch_sampler.places, drawn)


def best(logits: Tensor, forbidden: Tensor) -> Tensor:
    """The most likely token (rows,) of each row of `logits` (rows, vocabulary); NO_TOKEN for a row with NaN.

    Sets the logits of the tokens `forbidden` (any,) to -inf in place.
    """
    chances, tokens = logits.index_fill_(1, forbidden, -torch.inf).max(dim=-1)
    return torch.where(chances.isnan(), NO_TOKEN, tokens)
